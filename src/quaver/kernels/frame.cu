// One frame of speech as one kernel that stays on the GPU from the first logits to the next hidden state.
//
// Every multiprocessor holds one block. One of its warps does nothing but ask for weights: which tiles a block reads, and
// in which order, is known beforehand, so they stream through a ring in shared memory without ever waiting for what is
// computed. The others multiply tiles as they come, and blocks hand each other what comes out (see "mail").
//
// What counts is the way from one product to the next, of which a frame has some five hundred in a row. So a warp owns a
// share of a product's inputs: it waits for those alone, and multiplies them with all the rows that its block has. Warps
// meet once a product, when they add up what each of them has.
//
// Weights are the rows of the tensor cores' m16n8k16. A lane reads sixteen bytes of one row as they lie in memory, and hands
// them over as two rows of which the second has every other pair: a column holds the activations that belong to the one or to
// the other, and the row's product is the sum of two of the four outcomes. So one instruction takes all sixteen bytes, and
// nothing is moved. Up to four rows of activations cost as much as one. In 4 bits it is the same with m16n8k32 and bytes:
// weights are their 4 bits, activations become fifteen bits of which the lower and the upper byte have a column each.
//
// Constants that persistent.py puts above: GRID blocks of THREADS; SLOTS utterances; D, I, H, G, L: width, inner width, heads, key
// heads, layers of the talker; E, J, PH, PG, PL of the predictor; V, W ids of the first and of the other codebooks;
// Q codebooks; MOST_SPLITS shares of a cache; TALKER_INT4, PREDICTOR_INT4, PROJECTED.

constexpr int HD = 128, GROUP = 128;
constexpr int WARPS = THREADS / 32 - 1, WORKERS = 32 * WARPS;  // that compute: all but one
constexpr int SLOT_BYTES = 16384, MOST_RING = 32, MOST_SHARED = 232448;
constexpr int PAD = 64;  // between a tile's rows in shared memory, so that two of them meet different banks
constexpr int MIN_FRAMES = 2, ENDED = -1;
constexpr u32 MOST_TRIES = 1u << 24;
constexpr int COLS = 2 * SLOTS;
constexpr int MOST_KEPT = 64, MOST_CANDIDATES = 128, BINS = 512;
constexpr int ON_THEIR_WAY = 3;  // slots: more of them only stand in the way of what blocks hand each other
constexpr int SHARE = 64;  // positions of a cache that are worth a block of their own

constexpr int greater(int a, int b) { return a > b ? a : b; }
constexpr int lesser(int a, int b) { return a < b ? a : b; }
constexpr int divided(int a, int b) { return (a + b - 1) / b; }
constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }
// ``n``, halved until it is at most ``most``.
constexpr int halved(int n, int most) { return n > most ? halved(n / 2, most) : n; }
// The largest power of two that divides ``n``, up to ``most``.
constexpr int evenly(int n, int most) { return most > 1 && n % most ? evenly(n, most / 2) : most; }

// A product's weight: N outputs of K inputs, in tiles. Gated: gate above up, a tile has as many rows of each.
struct Shape {
  int n, k, int4;
  int rows, outs, pieces;  // of a tile: rows, outputs, runs of rows
  int tiles, row_bytes;
  int segments, segment, pitch;  // parts of a tile that fit into the ring's slots, bytes of a row in each, and between rows
  int groups, tables;     // of a row; bytes of a tile's float16 scales and, behind them, its zero points
  int unit, parts, share;  // inputs of a step; warps that share a row's steps, steps of each
  constexpr Shape(int n, int k, bool int4, bool gated)
      : n(n), k(k), int4(int4),
        // Sixteen where they fit into a slot and keep all blocks busy.
        rows(int4 && 8 * k <= SLOT_BYTES && divided(n * (1 + gated) / 16, GRID) * 2 <= divided(n * (1 + gated) / 8, GRID) ? 16 : 8),
        outs(gated ? rows / 2 : rows), pieces(1 + gated), tiles(n / outs), row_bytes(int4 ? k / 2 : 2 * k),
        segments(divided(row_bytes * rows, SLOT_BYTES)), segment(row_bytes / segments),
        pitch(segment + (segment % 128 ? 0 : PAD)), groups(k / GROUP), tables(int4 ? rows * groups * 3 : 0),
        unit(int4 ? GROUP : 32), parts(evenly(k / unit, WARPS)), share(k / unit / parts) {}
  constexpr bool fits() const {
    return n % outs == 0 && row_bytes % segments == 0 && segment % 64 == 0 && k % GROUP == 0 && (!int4 || outs * groups % 16 == 0);
  }
};

constexpr int SMALL_REPEATS = PH / PG;
enum { HEAD0, PROJECTION, QKV, OUT, GATE_UP, DOWN, SMALL_QKV, SMALL_OUT, SMALL_GATE_UP, SMALL_DOWN, HEAD, SHAPES };
constexpr int QKV_N = (H + 2 * G) * HD, SMALL_QKV_N = (PH + 2 * PG) * HD;
constexpr Shape shape_of(int which) {
  switch (which) {
    case HEAD0: return Shape(V, D, false, false);
    case PROJECTION: return Shape(E, D, false, false);
    case QKV: return Shape(QKV_N, D, TALKER_INT4, false);
    case OUT: return Shape(D, H * HD, TALKER_INT4, false);
    case GATE_UP: return Shape(I, D, TALKER_INT4, true);
    case DOWN: return Shape(D, I, TALKER_INT4, false);
    case SMALL_QKV: return Shape(SMALL_QKV_N, E, PREDICTOR_INT4, false);
    case SMALL_OUT: return Shape(E, PH * HD, PREDICTOR_INT4, false);
    case SMALL_GATE_UP: return Shape(J, E, PREDICTOR_INT4, true);
    case SMALL_DOWN: return Shape(E, J, PREDICTOR_INT4, false);
    default: return Shape(W, E, false, false);
  }
}
__constant__ constexpr Shape shapes[SHAPES] = {
    shape_of(0), shape_of(1), shape_of(2), shape_of(3), shape_of(4), shape_of(5),
    shape_of(6), shape_of(7), shape_of(8), shape_of(9), shape_of(10),
};
constexpr int most_tables() {
  int most = 0;
  for (int i = 0; i < SHAPES; ++i) most = greater(most, shape_of(i).tables);
  return most;
}
// Sums of a block's rows in one product.
constexpr int most_rows() {
  int most = 0;
  for (int i = 0; i < SHAPES; ++i) {
    const int rows = divided(shape_of(i).tiles, GRID) * shape_of(i).rows;
    most = greater(most, rows * (i >= SMALL_QKV ? COLS : SLOTS));
  }
  return most;
}
constexpr bool all_fit() {
  for (int i = 0; i < SHAPES; ++i)
    if (!shape_of(i).fits()) return false;
  return true;
}
// See "mail": of two products in a row every block must have a tile of one.
constexpr bool all_take_part() {
  for (int i = 0; i < SHAPES; ++i)
    if (2 * shape_of(i).tiles < GRID) return false;
  return true;
}
static_assert(all_fit(), "rows must split evenly");
static_assert(Q % 4 == 0 && SMALL_REPEATS * HD / 2 % (WORKERS / 4) == 0, "warps are busy as a whole");
static_assert(BINS == WORKERS, "each wipes one");
static_assert(SLOTS == 1 || SLOTS == 2, "two columns a row, of eight, and two rows a slot");
static_assert(all_take_part(), "too few rows for so many blocks");
static_assert(SLOTS * PG <= GRID, "a block takes a head");

constexpr int TABLE_ROOM = divided(most_tables(), 128) * 128;
constexpr int ROW_ROOM = SLOT_BYTES + 16 * PAD;
constexpr int RING_SLOT = ROW_ROOM + TABLE_ROOM;
constexpr int WIDEST = greater(greater(greater(D, I), H * HD) * SLOTS, greater(greater(E, J), PH * HD) * COLS);
constexpr int WIDE_D = greater(D * SLOTS, E * COLS);
constexpr int RED_PITCH = 20;  // floats between sums of a warp each: eight rows meet eight banks
constexpr int HEAD_PITCH = HD + 4;
constexpr int ATTENDED = (WARPS + 1) * (H / G) * HEAD_PITCH + 2 * HEAD_PITCH + 2 * WARPS * (H / G);

struct Weight { const u8* values; const u8* scales; const u8* zeros; };
constexpr int WEIGHTS = 1 + PROJECTED + 4 * PL + (Q - 1) + 4 * L;

struct Arguments {
  const u16* gains;               // [layers][before attention, of a query, of a key, before the MLP], the talker's
  const u16* small_gains;         // and the predictor's; behind the last layer's stands the norm after all of them
  const u16* projection_bias;
  u16* keys; u16* values;         // the talker's cache [L, SLOTS, G, capacity, d]
  u16* small_keys; u16* small_values;  // the predictor's [PL, SLOTS, PG, Q, d]
  const u16* cos; const u16* sin; const u16* small_cos; const u16* small_sin;  // [positions, d / 2]
  const u64* seed; int* frame; int* past; const int* prompt; const int* n_text; int* alive; u8* seen;
  const float* first; const float* residual;
  const u16* texts; int* codes; float* stops;
  u16* hidden;
  u64* boxes;                     // [4, BOX] what blocks hand each other, and
  u64* parts; u64* part_weights;  // [SLOTS, H, splits, d / 2] and [SLOTS, H, splits, 2]
  u32* exchange;                  // how many exchanges there were before this frame
  u64* trace;
  float eps, small_eps;
  int stop_id, n_banned, capacity, n_lines;  // positions of a slot's cache, rows of its text
  const u16* tables[Q];           // embeddings [V or W, D]
  const u16* projected[Q - 1];    // what the predictor reads of them [V or W, E]
  Weight stream[WEIGHTS];         // in the order in which a frame reads them; the predictor's layers once
};

// Where the gains of a layer are: addresses that need not be read from memory first.
template <int WIDTH>
struct Gains {
  const u16 *attention, *query, *key, *mlp;
  __device__ __forceinline__ Gains(const u16* all, int layer)
      : attention(all + layer * 2 * (WIDTH + HD)), query(attention + WIDTH), key(query + HD), mlp(key + HD) {}
};

struct Shared {
  u64 full[MOST_RING], empty[MOST_RING];
  alignas(16) Arguments arguments;
  alignas(16) float red[2][most_rows() * RED_PITCH];  // what warps add up, of this product and of the one before
  union {
    alignas(16) u16 x[WIDEST];           // a product's activations, in the order in which its weight is read
    alignas(16) float attended[ATTENDED];  // between two products
  };
  alignas(16) u16 raw[2][WIDE_D];     // the residual stream as it came into attention, and into the MLP
  alignas(16) float fresh[SMALL_REPEATS + 1][HD];   // of the predictor's attention: queries, the new key
  alignas(16) float scores[SMALL_REPEATS][Q];
  alignas(16) u16 past_values[Q][HD];  // numbers from the start
  float squares[2][COLS][WARPS];
  alignas(8) float2 scales[WIDEST / GROUP];
  u64 kept[MOST_CANDIDATES];
  float sorted[MOST_KEPT];
  int sorted_ids[MOST_KEPT];
  uint4 cut;  // how far below the highest the last bin begins, how many are above and in it, one; or how many there are
  alignas(16) u32 bins[BINS / 16 * 20];  // see bin_at
  int counts[4][WARPS];
  int code[SLOTS][Q];
  int frame[SLOTS], alive[SLOTS], prompt[SLOTS];
  u32 nibbles;  // a constant that would otherwise be made anew for every use
  u64 ring_waits;
  int n_marks;
};
constexpr int RING = lesser(MOST_RING, (MOST_SHARED - (int)sizeof(Shared)) / RING_SLOT);
static_assert(RING >= 4, "the model's rows leave no room for its weights");
// ``memory`` is the block's shared memory: the ring, then this.
#define s (*(Shared*)(memory + RING * RING_SLOT))
#define given (s.arguments)

// ---- numbers ----

__device__ __forceinline__ float bf_low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float bf_high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ float rounded(float x) { return bf_low(two_bf(x, 0.f)); }
__device__ __forceinline__ void workers_meet() { barrier(1, WORKERS); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
__device__ __forceinline__ void unpack(uint2 four, float (&x)[4]) {
  x[0] = bf_low(four.x), x[1] = bf_high(four.x), x[2] = bf_low(four.y), x[3] = bf_high(four.y);
}
__device__ __forceinline__ uint2 packed(const float (&x)[4]) { return make_uint2(two_bf(x[0], x[1]), two_bf(x[2], x[3])); }
__device__ __forceinline__ float dot(const float (&p)[4], const float (&q)[4]) {
  return p[0] * q[0] + p[1] * q[1] + p[2] * q[2] + p[3] * q[3];
}
// An error is better than a GPU that never comes back.
__device__ __forceinline__ void give_up(u32 tries) {
  if (tries > MOST_TRIES) trap();
}

// The moments of each block's first warp, where they are asked for: 1 rows are ready, 2 multiplied, 3 all warps have,
// 4 sent, 5 drawn, 6 attended.
constexpr int MOST_MARKS = 4096;
__device__ __forceinline__ void mark(int what) {
  if (TRACED && threadIdx.x == 0 && s.n_marks < MOST_MARKS) {
    u64* at = given.trace + 4 * (blockIdx.x * MOST_MARKS + s.n_marks++);
    at[0] = (u64)clock64(), at[1] = what, at[2] = s.ring_waits, at[3] = nanoseconds();
  }
}

// ---- the ring ----

__device__ __forceinline__ void wait_for(u64* gate, u32 parity) {
  u32 tries = 0;
  while (!passed(gate, parity)) give_up(++tries);
}

struct Place {
  int tid;  // asked of the machine once: it takes its time to tell
  int slot = 0, base = 0, turn = 0;  // turn: which of the two sets of sums is next
  u32 parity = 0;
  // At most as many as the ring has.
  __device__ __forceinline__ void skip(int n) {
    slot += n;
    if (slot >= RING) slot -= RING, parity ^= 1;
  }
  // Waits until the next n slots are filled: a lane each.
  __device__ __forceinline__ void wait(int n) const {
    const int lane = tid & 31, at = slot + lane, wrapped = at >= RING;
    if (lane < n) wait_for(&s.full[wrapped ? at - RING : at], parity ^ wrapped);
    __syncwarp();
  }
  __device__ __forceinline__ const u8* nth(int n) const {
    const int at = slot + n;
    return memory + (at >= RING ? at - RING : at) * RING_SLOT;
  }
  // A warp is done with the next n.
  __device__ __forceinline__ void release(int n) {
    const int lane = tid & 31, at = slot + lane;
    __syncwarp();
    if (lane < n) arrive(&s.empty[at >= RING ? at - RING : at]);
    skip(n);
  }
  // Tiles are dealt in turn over all products, so that no block has more to read than another.
  __device__ __forceinline__ int begin() const {
    const int first = (int)blockIdx.x - base;
    return first < 0 ? first + GRID : first;
  }
  __device__ __forceinline__ void end(int tiles) {
    base += tiles % GRID;
    if (base >= GRID) base -= GRID;
    turn ^= 1;
  }
};

// Asks for this block's tiles of a weight, as slots of the ring become free.
__device__ __noinline__ Place feed(Place place, int which, int weight, u64 policy) {
  const int lane = place.tid & 31;
  const Shape m = shapes[which];
  const Weight w = given.stream[weight];
  const bool whole = m.segments == 1 && m.pitch == m.segment;
#pragma unroll 1
  for (int tile = place.begin(); tile < m.tiles; tile += GRID) {
#pragma unroll 1
    for (int segment = 0; segment < m.segments; ++segment) {
      wait_for(&s.empty[place.slot], place.parity ^ 1);
      const bool wraps = place.slot < ON_THEIR_WAY;
      wait_for(&s.full[place.slot - ON_THEIR_WAY + (wraps ? RING : 0)], place.parity ^ wraps);
      u8* to = memory + place.slot * RING_SLOT;
      u64* gate = &s.full[place.slot];
      if (lane == 0) expect(gate, m.rows * m.segment + m.tables);
      __syncwarp();
      // Whole rows lie one behind the other.
      if (lane < (whole ? m.pieces : m.rows)) {
        const int rows = whole ? m.outs : 1, row = whole ? lane * m.n : lane % m.outs + (lane >= m.outs ? m.n : 0);
        fetch(to + lane * rows * m.pitch, w.values + (u64)(tile * m.outs + row) * m.row_bytes + segment * m.segment,
              rows * m.segment, gate, policy);
      }
      if (m.int4 && lane >= 16 && lane < 16 + 2 * m.pieces) {
        const int piece = (lane - 16) >> 1, row = tile * m.outs + piece * m.n, at = piece * m.outs * m.groups;
        if (lane & 1)
          fetch(to + ROW_ROOM + 2 * m.rows * m.groups + at, w.zeros + (u64)row * m.groups, m.outs * m.groups, gate, policy);
        else
          fetch(to + ROW_ROOM + 2 * at, w.scales + 2 * (u64)row * m.groups, 2 * m.outs * m.groups, gate, policy);
      }
      place.skip(1);
    }
  }
  place.end(m.tiles);
  return place;
}

// ---- mail: what blocks hand each other ----
//
// Every four bytes travel with the number of their exchange, eight bytes written at once, and are read again and again
// until that number is there. So nobody waits for more than what he needs, and no fence is needed between the two. Boxes
// are taken in turn, four of them: a block writes into the one of exchange n + 4 only when all that was sent in n + 3 is
// there, which took all of n + 2, and so on; and of any two products in a row every block has a tile of one, so by then
// everyone has read exchange n.

constexpr int BOXES = 4;
constexpr int BOX = greater(greater(greater(QKV_N, I), greater(V, D)) * SLOTS, greater(SMALL_QKV_N, greater(J, E)) * COLS) / 2;

__device__ __forceinline__ u64* outbox(u32 number) { return given.boxes + (number % BOXES) * BOX; }
__device__ __forceinline__ void send(u64* to, u32 number, u32 what) { store(to, make_uint2(what, number)); }
// Waits for M times eight bytes of what was sent, all asked for at once; those that are not wanted are left as they are.
template <int M>
__device__ __forceinline__ void receive(uint2 (&got)[M], const u64* const (&from)[M], const bool (&wanted)[M], u32 number) {
  u32 tries = 0;
  bool there;
  do {
    u32 m[M], n[M];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      m[i] = n[i] = number;
      if (wanted[i]) {
        const uint4 now = load16(from[i]);
        got[i] = make_uint2(now.x, now.z), m[i] = now.y, n[i] = now.w;
      }
    }
    there = true;
#pragma unroll
    for (int i = 0; i < M; ++i) there = there && m[i] == number && n[i] == number;
    give_up(++tries);
  } while (!there);
}
// Where four bfloat16 of an exchange are, from the at-th on.
__device__ __forceinline__ const u64* box(u32 number, int at) { return outbox(number) + at / 2; }
__device__ __forceinline__ uint2 receive(u32 number, int at) {
  uint2 got[1];
  const u64* const from[1] = {box(number, at)};
  const bool wanted[1] = {true};
  receive<1>(got, from, wanted, number);
  return got[0];
}

// ---- products ----

// Products that are added to the residual stream.
constexpr bool onto_stream(int which) { return which == OUT || which == DOWN || which == SMALL_OUT || which == SMALL_DOWN; }

// Four words of four bytes, with rows for columns.
__device__ __forceinline__ uint4 turned(const uint4& x) {
  const u32 a = __byte_perm(x.x, x.y, 0x5140), b = __byte_perm(x.z, x.w, 0x5140);
  const u32 c = __byte_perm(x.x, x.y, 0x7362), d = __byte_perm(x.z, x.w, 0x7362);
  return make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632));
}

// The product of eight rows and a group, 32 weights a lane, as whole numbers.
__device__ __forceinline__ int multiply_group(const uint4& w, const uint4& x, u32 nibbles) {
  int c[4] = {0, 0, 0, 0};
  multiply_bytes(c, w.x & nibbles, w.x >> 4 & nibbles, w.y & nibbles, w.y >> 4 & nibbles, x.x, x.y);
  multiply_bytes(c, w.z & nibbles, w.z >> 4 & nibbles, w.w & nibbles, w.w >> 4 & nibbles, x.z, x.w);
  return c[0] + c[3];
}

// A thread's warp is the how manieth of those that share a row.
template <int WHICH> __device__ __forceinline__ int part_of(int tid) {
  constexpr int parts = shape_of(WHICH).parts;
  return parts == WARPS ? tid >> 5 : (tid >> 5) % parts;
}

// A lane's share of some tiles of a weight. Where fewer warps than there are share a row, sets of them take tiles in turn.
template <int WHICH>
struct Tiles {
  static constexpr Shape m = shape_of(WHICH);
  static constexpr int sets = m.segments == 1 ? halved(WARPS / m.parts, RING / 2) : 1, halves = m.rows / 8;
  // Tiles of one slot are taken several at once, as many as registers and half of the ring hold.
  static constexpr int most = divided(m.tiles, GRID), room = lesser(m.int4 ? 3 : 4, RING / 2 / sets);
  static constexpr int own = m.segments == 1 ? divided(most, divided(most, sets * room) * sets) : 1;
  static constexpr int at_once = own * sets, n = own * halves;
  static_assert(m.segments <= RING, "a tile must fit into the ring");
  uint4 values[n][m.share];
  float scales[m.int4 ? n : 1][m.share], zeros[m.int4 ? n : 1][m.share];

  static constexpr int ROWS = most * m.rows;  // of a block
  static __device__ __forceinline__ int set(int tid) { return sets == 1 ? 0 : (tid >> 5) / m.parts; }
  // Whether this warp is of a set; nobody needs the others.
  static __device__ __forceinline__ bool busy(int tid) { return WARPS == sets * m.parts || tid >> 5 < sets * m.parts; }
  // The tile that the i-th eight rows are of, after those that were taken before.
  static __device__ __forceinline__ int nth(int tid, int start, int i) { return start + i / halves * sets + set(tid); }
  // Those from the start-th on, of so many that there are, once they have come; their slots are free again.
  __device__ __forceinline__ void take(Place& place, int start, int tiles) {
    const int tid = place.tid, lane = tid & 31, g = lane >> 2, t = lane & 3, part = part_of<WHICH>(tid);
    const int now = m.segments > 1 ? start < tiles ? m.segments : 0 : min(at_once, tiles - start);
    const long long before = TRACED ? clock64() : 0;
    place.wait(now);
    if (TRACED && threadIdx.x == 0) s.ring_waits += clock64() - before;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      // What lies in slots that are not there yet comes to nothing.
      const int row = 8 * (i % halves) + g;
      const u8 *slot = place.nth(busy(tid) ? nth(tid, 0, i) : 0), *tables = slot + ROW_ROOM;
#pragma unroll
      for (int j = 0; j < m.share; ++j) {
        const int step = part * m.share + j, steps = m.k / m.unit / m.segments;
        const u8* from = slot;
#pragma unroll
        for (int segment = 1; segment < m.segments; ++segment)
          if (step >= segment * steps) from = place.nth(segment) - 64 * segment * steps;
        values[i][j] = *(const uint4*)(from + row * m.pitch + t * 16 + step * 64);
        if constexpr (m.int4) {
          scales[i][j] = half(((const u16*)tables)[row * m.groups + step]);
          zeros[i][j] = (tables + 2 * m.rows * m.groups)[row * m.groups + step];
        }
      }
    }
    place.release(now);
  }
};

// Where the rows of a product come from: exchange ``number``, or, for the first of a stack's layers, codes.
struct Rows { const u16* gain; bool from_codes; int codebook, skipped; };

template <int WHICH, int COLUMNS> __device__ __forceinline__ float stage(const Rows& rows, int tid, int turn, u32 number);
__device__ __forceinline__ void note_square(int tid, int turn, int row, int part, float square);
// What an RMS norm stands before.
constexpr bool normed(int which) { return which == QKV || which == GATE_UP || which == SMALL_QKV || which == SMALL_GATE_UP || which == HEAD; }

__device__ __forceinline__ void stage_attended(int tid, u32 number);

// Sends the product of COLUMNS rows, finished in float32, outputs in pairs, as exchange ``number``.
//
// The rows may still lack what their RMS norm divides by; their squares are in s.squares. What is first multiplied is in
// registers before the rows are there.
template <int WHICH, int COLUMNS>
__device__ __noinline__ Place product(Place place, Rows rows, u32 number, float eps) {
  using Mine = Tiles<WHICH>;
  constexpr Shape m = Mine::m;
  // In 4 bits a row of activations takes four columns.
  constexpr int passes = m.int4 ? divided(COLUMNS, 2) : 1, kept = m.int4 ? 1 : m.share, columns_log = log2_of(COLUMNS);
  const int tid = place.tid, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, part = part_of<WHICH>(tid);
  const int first = place.begin(), tiles = first < m.tiles ? divided(m.tiles - first, GRID) : 0;
  float* red = s.red[place.turn];
  Mine mine;
  mine.take(place, 0, tiles);
  // Before the meeting: nothing behind it should wait for what is known.
  u64* const to = outbox(number);
  const float square = stage<WHICH, COLUMNS>(rows, tid, place.turn, number - 1);
  const u32 nibbles = s.nibbles;
  // Two columns a row: what belongs to the even pairs of eight inputs, and to the odd ones. Others repeat them.
  const u16* x = s.x + (g >> 1) % COLUMNS * m.k + part * m.share * m.unit + 8 * t + 4 * (g & 1);
  uint2 b[kept];
#pragma unroll
  for (int i = 0; i < kept; ++i) b[i] = m.int4 ? make_uint2(0, 0) : *(const uint2*)(x + 32 * i);
  float* const own = red + ((m.int4 ? t >> 1 : t) * Mine::ROWS + Mine::set(tid) * m.rows + g) * RED_PITCH + part;
#pragma unroll
  for (int start = 0; start < Mine::most; start += Mine::at_once) {
    if (start > 0) {
      if (start >= tiles) break;
      mine.take(place, start, tiles);
    }
    float sums[passes][Mine::n];
#pragma unroll
    for (int i = 0; i < passes * Mine::n; ++i) sums[i / Mine::n][i % Mine::n] = 0.f;
    if constexpr (!m.int4) {
#pragma unroll
      for (int i = 0; i < Mine::n; ++i) {
        float c[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
        for (int j = 0; j < m.share; ++j) {
          const uint4& a = mine.values[i][j];
          multiply(c[j & 1], a.x, a.y, a.z, a.w, b[j].x, b[j].y);
        }
        sums[0][i] = c[0][0] + c[0][3];
        if (m.share > 1) sums[0][i] += c[1][0] + c[1][3];
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < passes; ++pass) {
        // A lane hands over a byte of a row, and gets the outcomes of a lower or of an upper one.
        const int row = (2 * pass + (g >> 2)) % COLUMNS, got = (2 * pass + (t >> 1)) % COLUMNS;
        const bool upper = t & 1;
#pragma unroll
        for (int j = 0; j < m.share; ++j) {
          const int group = part * m.share + j;
          const uint4 bytes = turned(*(const uint4*)(s.x + row * m.k + group * GROUP + 32 * (g & 3) + 8 * t));
          const float2 scale = s.scales[got * m.groups + group];
          const float step = upper ? 256.f * scale.x : scale.x, sum = upper ? 0.f : scale.y;
#pragma unroll
          for (int i = 0; i < Mine::n; ++i)
            sums[pass][i] += mine.scales[i][j] * (step * (float)multiply_group(mine.values[i][j], bytes, nibbles) - mine.zeros[i][j] * sum);
        }
#pragma unroll
        for (int i = 0; i < Mine::n; ++i) sums[pass][i] += __shfl_xor_sync(~0u, sums[pass][i], 1);
      }
    }
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      if (m.int4 ? (t & 1) || 2 * pass + (t >> 1) >= COLUMNS : t >= COLUMNS) continue;
#pragma unroll
      for (int i = 0; i < Mine::n; ++i) {
        const int nth = start + i / Mine::halves * Mine::sets;
        // Rows that no tile has are never read.
        if (Mine::sets == 1 ? nth < Mine::most : Mine::nth(tid, start, i) < tiles && Mine::busy(tid))
          own[(2 * pass * Mine::ROWS + nth * m.rows + 8 * (i % Mine::halves)) * RED_PITCH] = sums[pass][i];
      }
    }
  }
  if constexpr (normed(WHICH)) note_square(tid, place.turn, COLUMNS - 1, part, square);
  mark(2);
  workers_meet();
  mark(3);
  // Eight threads add up two outputs.
  constexpr int outs_log = log2_of(m.outs) - 1, pairs_log = columns_log + outs_log;
  const int pairs = tiles << pairs_log, q = lane & 7;
#pragma unroll 1
  for (int start = 4 * warp; start < pairs; start += 4 * WARPS) {
    const int pair = min(start + (lane >> 3), pairs - 1), nth = pair >> pairs_log, column = pair % COLUMNS;
    const int row = 2 * ((pair >> columns_log) & ((1 << outs_log) - 1)), at = (first + nth * GRID) * m.outs + row;
    const float* from = red + (column * Mine::ROWS + nth * m.rows + row) * RED_PITCH + q;
    u32 base = 0;
    if (onto_stream(WHICH)) base = *(const u32*)(s.raw[WHICH == DOWN || WHICH == SMALL_DOWN] + column * m.n + at);
    if (WHICH == PROJECTION) base = *(const u32*)(given.projection_bias + at);
    float sums[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      sums[i] = 0.f;
      if (i < 2 * m.pieces || (i == 4 && normed(WHICH))) {
        const float* at = i == 4 ? s.squares[place.turn][column] + q : from + ((i & 1) + (i >> 1) * m.outs) * RED_PITCH;
        if (m.parts >= 8 || q < m.parts) sums[i] = at[0];
        if (m.parts > 8) sums[i] += at[8];
      }
    }
#pragma unroll
    for (int d = 4; d; d >>= 1)
#pragma unroll
      for (int i = 0; i < 5; ++i)
        if (i < 2 * m.pieces || (i == 4 && normed(WHICH))) sums[i] += __shfl_xor_sync(~0u, sums[i], d);
    const float by = normed(WHICH) ? rsqrtf(sums[4] * (1.f / m.k) + eps) : 1.f;
    float x = sums[0] * by, y = sums[1] * by;
    if (m.pieces == 2) {
      x = __fdividef(x, 1.f + __expf(-x)) * sums[2] * by;
      y = __fdividef(y, 1.f + __expf(-y)) * sums[3] * by;
    } else {
      x += bf_low(base), y += bf_high(base);
    }
    if (q == 0 && start + (lane >> 3) < pairs) send(to + (column * m.n + at) / 2, number, two_bf(x, y));
  }
  place.end(m.tiles);
  mark(4);
  return place;
}

// ---- activations: each warp brings those that it multiplies ----

// A warp's share of a row.
template <int WHICH>
struct Share {
  static constexpr Shape m = shape_of(WHICH);
  static constexpr int WIDTH = m.share * m.unit, CHUNKS = divided(WIDTH, 128);
  static constexpr bool HEADS = m.parts == WARPS && WIDTH == HD;  // of a row of WARPS heads a warp has one
  const int lane, begin;
  __device__ __forceinline__ explicit Share(int tid) : lane(tid & 31), begin(part_of<WHICH>(tid) * WIDTH + 4 * lane) {}
  __device__ __forceinline__ bool has(int i) const { return WIDTH % 128 == 0 || 128 * i + 4 * lane < WIDTH; }
};

// Four inputs, from the at-th on, to where the weight's fragments want them. For 4 bits a group becomes whole numbers of
// fifteen bits, of a unit that is a power of two: so those that are not far below the largest are what they were. Their
// lower and their upper bytes, and what the unit is and what all are together (s.scales), are for the product.
template <int WHICH>
__device__ __forceinline__ void put(int tid, int column, int at, uint2 four) {
  constexpr Shape m = shape_of(WHICH);
  if constexpr (!m.int4) {
    // Of eight inputs even pairs lie before odd ones.
    u32* to = (u32*)(s.x + column * m.k + at / 8 * 8) + (at >> 2 & 1);
    to[0] = four.x, to[2] = four.y;
  } else {
    constexpr int BIAS = 127, BITS = 13;
    const int lane = tid & 31, group = at / GROUP, j = lane >> 2, t = lane & 3;
    const u32 a = four.x & 0x7fff7fffu, b = four.y & 0x7fff7fffu;
    const int largest = __reduce_max_sync(~0u, (int)max(max(a & 0xffff, a >> 16), max(b & 0xffff, b >> 16)));
    const int exponent = max(largest >> 7, BITS + 1);
    const float by = __int_as_float((2 * BIAS + BITS - exponent) << 23), unit = __int_as_float((exponent - BITS) << 23);
    float x[4];
    unpack(four, x);
    u32 whole[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) whole[e] = __float_as_uint(fmaf(x[e], by, 12582912.f));  // its lower bits are the number
    const u32 lower = __byte_perm(__byte_perm(whole[0], whole[1], 0x0040), __byte_perm(whole[2], whole[3], 0x0040), 0x5410);
    int sum = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum += (short)whole[e], whole[e] += 128;
    const u32 upper = __byte_perm(__byte_perm(whole[0], whole[1], 0x0051), __byte_perm(whole[2], whole[3], 0x0051), 0x5410);
    u32* to = (u32*)(s.x + column * m.k + group * GROUP) + (j & 1) * 16 + t * 4 + (j >> 1);
    to[0] = lower, to[32] = upper;
    sum = (int)__reduce_add_sync(~0u, (u32)sum);
    // What is no number stays none.
    if (lane == 0) s.scales[column * m.groups + group] = make_float2(largest < 0x7f80 ? unit : bf_low(0x7fc0), unit * sum);
  }
}

// Puts rows that arrive by mail (or, for the first product, the hidden states) into s.x, as a product wants them.
template <int WHICH, int COLUMNS>
__device__ __forceinline__ void stage_plain(int tid, u32 number) {
  constexpr Shape m = shape_of(WHICH);
  const Share<WHICH> share(tid);
  constexpr int chunks = Share<WHICH>::CHUNKS;
#pragma unroll 1
  for (int column = 0; column < COLUMNS; ++column) {
    uint2 four[chunks];
    const u64* from[chunks];
    bool wanted[chunks];
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      const int at = column * m.k + share.begin + 128 * i;
      wanted[i] = share.has(i);
      from[i] = box(number, at);
      if (WHICH == HEAD0 && wanted[i]) four[i] = load8(given.hidden + at);
    }
    if (WHICH != HEAD0) receive<chunks>(four, from, wanted, number);
#pragma unroll
    for (int i = 0; i < chunks; ++i)
      if (wanted[i]) put<WHICH>(tid, column, share.begin + 128 * i, four[i]);
  }
}

// The talker's next input: the sum of a frame's embeddings and its text, each addition rounded where the model rounds.
__device__ __forceinline__ uint2 embedded(int slot, int at) {
  float sum[4] = {0.f, 0.f, 0.f, 0.f}, x[4], t[4];
  const int line = min(s.frame[slot], given.n_text[slot] - 1);
  const uint2 text = load8(given.texts + ((u64)slot * given.n_lines + line) * D + at);
  const uint2 first = load8(given.tables[0] + (u64)s.code[slot][0] * D + at);
#pragma unroll 5
  for (int codebook = 1; codebook < Q; ++codebook) {
    unpack(load8(given.tables[codebook] + (u64)s.code[slot][codebook] * D + at), x);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += x[j];
  }
  unpack(first, x);
  unpack(text, t);
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] = rounded(x[j] + rounded(sum[j])) + t[j];
  return packed(sum);
}

enum { MAIL, CODES, FRAME };

// The same for what an RMS norm stands before: rows from the mail, or the embeddings of the code before ``codebook``, or
// of the whole frame; the first ``skipped`` rows are left out. What the norm divides by is left to the product: squares
// go to s.squares, those of the last row are returned, a lane's own, and the rows as they came go to s.raw.
template <int WHICH, int COLUMNS, int SOURCE>
__device__ __forceinline__ float stage_normed(const Rows& rows, int tid, int turn, u32 number) {
  const int skipped = rows.skipped, codebook = rows.codebook;
  const u16* gain = rows.gain;
  constexpr Shape m = shape_of(WHICH);
  const Share<WHICH> share(tid);
  constexpr int chunks = Share<WHICH>::CHUNKS;
  u16* raw = s.raw[WHICH == GATE_UP || WHICH == SMALL_GATE_UP];
  // What does not depend on other blocks is asked for first.
  uint2 by[chunks];
#pragma unroll
  for (int i = 0; i < chunks; ++i) by[i] = share.has(i) ? load8(gain + share.begin + 128 * i) : make_uint2(0, 0);
  float square = 0.f;
#pragma unroll 1
  for (int row = 0; row < COLUMNS; ++row) {
    if (row) note_square(tid, turn, row - 1, part_of<WHICH>(tid), square);
    const int column = row + skipped;
    uint2 four[chunks];
    const u64* from[chunks];
    bool wanted[chunks];
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      const int at = share.begin + 128 * i;
      wanted[i] = share.has(i);
      from[i] = box(number, column * m.k + at);
      four[i] = make_uint2(0, 0);
      if (SOURCE == FRAME && wanted[i]) four[i] = embedded(column, at);
      if (SOURCE == CODES && wanted[i]) {
        if (codebook > 1 || column >= SLOTS)
          four[i] = load8(given.projected[codebook - 1] + (u64)s.code[column % SLOTS][codebook - 1] * m.k + at);
        else if (!PROJECTED)
          four[i] = load8(given.hidden + column * m.k + at);
      }
    }
    if (SOURCE == MAIL || (SOURCE == CODES && PROJECTED && codebook == 1 && column < SLOTS)) receive<chunks>(four, from, wanted, number);
    square = 0.f;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      float x[4], b[4];
      unpack(four[i], x);
      unpack(by[i], b);
      square += dot(x, x);
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] *= x[j];
      if (wanted[i]) {
        if (WHICH != HEAD) *(uint2*)(raw + column * m.k + share.begin + 128 * i) = four[i];
        put<WHICH>(tid, row, share.begin + 128 * i, packed(b));
      }
    }
  }
  return square;
}
__device__ __forceinline__ void note_square(int tid, int turn, int row, int part, float square) {
  square = warp_sum(square);
  if ((tid & 31) == 0) s.squares[turn][row][part] = square;
}

template <int WHICH, int COLUMNS>
__device__ __forceinline__ float stage(const Rows& rows, int tid, int turn, u32 number) {
  float square = 0.f;
  // They are the product's before.
  if constexpr (WHICH == PROJECTION) return square;
  if constexpr (WHICH == OUT) stage_attended(tid, number);
  else if constexpr (!normed(WHICH)) stage_plain<WHICH, COLUMNS>(tid, number);
  else if (WHICH == QKV && rows.from_codes) square = stage_normed<WHICH, COLUMNS, FRAME>(rows, tid, turn, number);
  else if (WHICH == SMALL_QKV && rows.from_codes) square = stage_normed<WHICH, COLUMNS, CODES>(rows, tid, turn, number);
  else square = stage_normed<WHICH, COLUMNS, MAIL>(rows, tid, turn, number);
  __syncwarp();
  mark(1);
  return square;
}

// What turns a head to ``position``: four values a lane each of the norm's gain, the cosine and the sine.
struct Turn {
  uint2 gain, cos, sin;
  __device__ __forceinline__ Turn(const u16* gains, const u16* cosines, const u16* sines, int position) {
    const int lane = threadIdx.x & 31, at = position * (HD / 2) + 4 * (lane & 15);
    gain = load8(gains + 4 * lane), cos = load8(cosines + at), sin = load8(sines + at);
  }
  // Norms and turns, and rounds as the cache does.
  __device__ __forceinline__ void operator()(float (&x)[4], float eps) const {
    const float rstd = rsqrtf(warp_sum(dot(x, x)) / HD + eps);
    float by[4], c[4], n[4];
    unpack(gain, by);
    unpack(cos, c);
    unpack(sin, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float mine = x[i] * rstd * by[i], other = __shfl_xor_sync(~0u, mine, 16);
      x[i] = rounded(mine * c[i] + ((threadIdx.x & 16) ? other : -other) * n[i]);
    }
  }
};

// The sums over all lanes of M values each, a power of two: a lane gets that of value ``lane / (32 / M)``.
template <int M>
__device__ __forceinline__ float warp_sums(float (&x)[M]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int m = M / 2, d = 16; m; m >>= 1, d >>= 1)
#pragma unroll
    for (int i = 0; i < m; ++i) {
      const bool later = lane & d;
      const float keep = later ? x[i + m] : x[i], pass = later ? x[i] : x[i + m];
      x[i] = keep + __shfl_xor_sync(~0u, pass, d);
    }
#pragma unroll
  for (int d = 16 / M; d; d >>= 1) x[0] += __shfl_xor_sync(~0u, x[0], d);
  return x[0];
}

// A softmax that grows: its highest score, its weight and its sum, four values a lane.
struct Softmax {
  float peak = -1e30f, weight = 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
  // M scores and what they weigh; those beyond ``n`` do not count.
  template <int M>
  __device__ __forceinline__ void add(const float (&q)[4], const uint2 (&keys)[M], const uint2 (&values)[M], int n) {
    const int which = (threadIdx.x & 31) / (32 / M);
    float score[M];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      float x[4];
      unpack(keys[i], x);
      score[i] = dot(q, x);
    }
    float own = warp_sums<M>(score) * rsqrtf((float)HD);
    if (which >= n) own = -1e30f;
    float risen = fmaxf(peak, own);
#pragma unroll
    for (int d = 16; d >= 32 / M; d >>= 1) risen = fmaxf(risen, __shfl_xor_sync(~0u, risen, d));
    const float part = which < n ? __expf(own - risen) : 0.f, fade = __expf(peak - risen);
    weight *= fade;
#pragma unroll
    for (int j = 0; j < 4; ++j) o[j] *= fade;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const float by = __shfl_sync(~0u, part, i * (32 / M));
      float x[4];
      unpack(values[i], x);
      weight += by;
#pragma unroll
      for (int j = 0; j < 4; ++j) o[j] += by * x[j];
    }
    peak = risen;
  }
};

// ---- sampling: the same in every block ----

__device__ __forceinline__ u32 mix(u32 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
__device__ __forceinline__ float uniform(u64 seed, u32 frame, u32 codebook) {
  u32 x = mix((u32)seed ^ 0x9E3779B9u);
  x = mix(x ^ (u32)(seed >> 32));
  x = mix(x ^ (frame * 0x85EBCA6Bu));
  x = mix(x ^ (codebook * 0xC2B2AE35u));
  return ((x >> 8) + 0.5f) * (1.f / 16777216.f);
}
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
__device__ __forceinline__ float of_order(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7FFFFFFF)); }
// Where the i-th bin is: sixteen and a gap, so that lanes meet different banks.
__device__ __forceinline__ u32* bin_at(u32 i) { return s.bins + i + i / 16 * 4; }

// A number of each warp: a lane gets that of the warp it is named for, later ones zero.
__device__ __forceinline__ int of_warps(int& round, int mine) {
  int* at = s.counts[round++ & 3];
  const int lane = threadIdx.x & 31;
  if (lane == 0) at[threadIdx.x >> 5] = mine;
  workers_meet();
  return lane < WARPS ? at[lane] : 0;
}
__device__ __forceinline__ int highest(int& round, int x) {
  x = of_warps(round, __reduce_max_sync(~0u, x));
  return __reduce_max_sync(~0u, (threadIdx.x & 31) < WARPS ? x : (int)0x80000000);
}
// The sum of all lanes' up to this one.
__device__ __forceinline__ int upto(int x) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int y = __shfl_up_sync(~0u, x, d);
    if ((threadIdx.x & 31) >= d) x += y;
  }
  return x;
}

// Draws a code in [0, IDS) for each slot into s.code[slot][codebook]; the likeliest first, equal ones from the lowest id.
template <int IDS, bool FIRST>
__device__ __noinline__ void sample(u32 number, int codebook) {
  constexpr int PER = 4 * divided(IDS, 4 * WORKERS), FOURS = PER / 4;
  static_assert(IDS % PER == 0 && 32 * PER < 1024, "ids are dealt to threads, four at a time, and counted in ten bits a warp");
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const bool has = tid < IDS / PER;
#pragma unroll 1
  for (int slot = 0; slot < SLOTS; ++slot) {
    int round = 0;
    *bin_at(tid) = 0;
    const float* knobs = (FIRST ? given.first : given.residual) + 4 * slot;
    const float temperature = knobs[0], top_p = knobs[2], penalty = knobs[3];
    const bool greedy = temperature == 0.f;
    const int frame = s.frame[slot], wanted_k = (int)knobs[1];
    const u64 seed = given.seed[slot];
    u32 seen[FOURS];
    if (FIRST) {
#pragma unroll
      for (int i = 0; i < FOURS; ++i) seen[i] = has ? *(const u32*)(given.seen + slot * IDS + tid * PER + 4 * i) : 0;
    }
    float x[PER];
    uint2 got[FOURS];
    const u64* from[FOURS];
    bool wanted[FOURS];
#pragma unroll
    for (int i = 0; i < FOURS; ++i) from[i] = box(number, slot * IDS + tid * PER + 4 * i), wanted[i] = has, got[i] = make_uint2(0, 0);
    receive<FOURS>(got, from, wanted, number);
#pragma unroll
    for (int i = 0; i < FOURS; ++i) {
      x[4 * i] = bf_low(got[i].x), x[4 * i + 1] = bf_high(got[i].x);
      x[4 * i + 2] = bf_low(got[i].y), x[4 * i + 3] = bf_high(got[i].y);
    }
    constexpr float LEAST = -3.0e38f;
    if (FIRST) {
      // The stop's probability is of the logits as they are.
      int key = 0x80000000;
#pragma unroll
      for (int i = 0; i < PER; ++i) key = max(key, ordered(has ? x[i] : LEAST));
      key = highest(round, key);
      const float peak = of_order(key);
      float sum = 0.f, stop = 0.f;
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const float e = has ? __expf(x[i] - peak) : 0.f;
        sum += e;
        if (tid * PER + i == given.stop_id) stop = e;
      }
      sum = warp_sum(__int_as_float(of_warps(round, __float_as_int(warp_sum(sum)))));
      if (given.stop_id / PER == tid && blockIdx.x == 0) given.stops[min(frame, given.capacity - 1) * SLOTS + slot] = __fdividef(stop, sum);
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const int id = tid * PER + i;
        if (seen[i / 4] >> (8 * (i & 3)) & 0xff) x[i] = x[i] < 0 ? x[i] * penalty : __fdividef(x[i], penalty);
        if (!(id < IDS - given.n_banned || (id == given.stop_id && frame >= MIN_FRAMES))) x[i] = -__int_as_float(0x7f800000);
      }
    }
    const int n_inside = FIRST ? IDS - given.n_banned + (frame >= MIN_FRAMES && given.stop_id >= IDS - given.n_banned) : IDS;
    int k = greedy ? 1 : wanted_k > 0 ? min(wanted_k, n_inside) : n_inside;
    k = min(k, MOST_KEPT);
    // Keys are ordered as scores are; those of bfloat16 have sixteen bits. What counts is how far below the highest they are.
    constexpr int SHIFT = FIRST ? 0 : 16, ALL = 32 - SHIFT - log2_of(BINS);  // bins so wide hold all there are
    constexpr u32 NEVER = ~0u;
    u32 below[PER];
    int high = 0x80000000;
    const float by = greedy ? 1.f : __fdividef(1.f, temperature);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const int key = has ? ordered(x[i]) >> SHIFT : 0x80000000;
      below[i] = (u32)key, high = max(high, key);
    }
    high = highest(round, high);
#pragma unroll
    for (int i = 0; i < PER; ++i) below[i] = !has || x[i] == -__int_as_float(0x7f800000) ? NEVER : (u32)high - below[i];
    // How many are how far below is counted in bins, first of a bfloat16's step each: the k-th is in the one where the count
    // reaches k. All of that bin are candidates, where they are not too many: then it is counted in finer ones.
    int width = FIRST ? 16 : 0, n_above = 0, n_level = 0;
    u32 edge = 0;
#pragma unroll 1
    while (true) {
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        const u32 bin = (below[i] - edge) >> width;
        if (below[i] != NEVER && below[i] >= edge && bin < BINS) count(bin_at(bin));
      }
      workers_meet();
      if (warp == 0) {
        // Sixteen bins a lane.
        int bins[16], all = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 four = *(const uint4*)(bin_at(16 * lane) + 4 * i);
          bins[4 * i] = four.x, bins[4 * i + 1] = four.y, bins[4 * i + 2] = four.z, bins[4 * i + 3] = four.w;
          all += (four.x + four.y) + (four.z + four.w);
        }
        const int sum = n_above + upto(all);
        int before = sum - all, bin = 0, n_before = before, n_in = 0;
        if (lane == 31 && sum < k) s.cut = make_uint4(sum, 0, 0, 0);
        if (before < k && k <= sum) {
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            before += bins[i];
            if (before < k) bin = i + 1, n_before = before;
            else if (bin == i) n_in = bins[i];
          }
          s.cut = make_uint4(edge + ((u32)(16 * lane + bin) << width), n_before, n_in, 1);
        }
      }
      workers_meet();
      const uint4 cut = s.cut;
      if (cut.w) {
        edge = cut.x, n_above = cut.y, n_level = cut.z;
        if (n_above + n_level <= MOST_CANDIDATES || width == 0) break;
        width = max(width - log2_of(BINS), 0);
      } else if (width != ALL) {
        width = ALL;
      } else {
        // Fewer than k are above minus infinity, of a model that is broken: even then something is drawn.
        k = cut.x;
        if (k == 0) break;
      }
      *bin_at(tid) = 0;
      workers_meet();
    }
    const u32 last = edge + ((1u << width) - 1);
    // Those above the edge in the order of their ids, then those at the edge: of equal ones the lowest ids.
    u32 lower = 0, mine = 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      const u32 is_above = __ballot_sync(~0u, below[i] < edge), is_level = __ballot_sync(~0u, below[i] >= edge && below[i] <= last);
      const u32 under = (1u << lane) - 1;
      lower += __popc(is_above & under) | __popc(is_level & under) << 16;
      mine += __popc(is_above) | __popc(is_level) << 16;
    }
    const u32 of_warp = (u32)of_warps(round, (int)mine);
    lower += __reduce_add_sync(~0u, lane < warp ? of_warp : 0u);
    int above = lower & 0xffff, level = n_above + (lower >> 16);
#pragma unroll
    for (int i = 0; i < PER; ++i)
      if (below[i] <= last) {
        const int at = below[i] < edge ? above++ : level++;
        // The likelier one is the larger number, or of equal ones the one with the lower id.
        const u32 likely = (u32)ordered(x[i] * by) ^ 0x80000000u;
        if (at < MOST_CANDIDATES) s.kept[at] = (u64)likely << 32 | ~(u32)(tid * PER + i);
      }
    const int n = min(n_above + n_level, MOST_CANDIDATES);
    if (tid == 0 && k == 0) s.sorted[0] = 0.f, s.sorted_ids[0] = 0;
    k = max(k, 1);
    workers_meet();
    // Each finds its place: how many are larger. Eight threads count for one.
#pragma unroll 1
    for (int first = 4 * warp; first < n; first += 4 * WARPS) {
      const int candidate = first + (lane >> 3);
      const u64 own = s.kept[candidate];
      int rank = 0;
#pragma unroll 4
      for (int j = lane & 7; j < n; j += 8) rank += s.kept[j] > own;
#pragma unroll
      for (int d = 1; d < 8; d <<= 1) rank += __shfl_xor_sync(~0u, rank, d);
      if ((lane & 7) == 0 && candidate < n && rank < k)
        s.sorted[rank] = of_order((int)((u32)(own >> 32) ^ 0x80000000u)), s.sorted_ids[rank] = (int)~(u32)own;
    }
    workers_meet();
    if (warp == 0) {
      const float peak = s.sorted[0];
      const float m0 = lane < k ? __expf(s.sorted[lane] - peak) : 0.f;
      const float m1 = lane + 32 < k ? __expf(s.sorted[lane + 32] - peak) : 0.f;
      float c0 = m0, c1 = m1;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const float y0 = __shfl_up_sync(~0u, c0, d), y1 = __shfl_up_sync(~0u, c1, d);
        if (lane >= d) c0 += y0, c1 += y1;
      }
      c1 += __shfl_sync(~0u, c0, 31);
      float total = __shfl_sync(~0u, c1, 31);
      if (top_p < 1.f) {
        // One is kept while what lies before it is below the goal.
        const float goal = top_p * total;
        k = __popc(__ballot_sync(~0u, lane < k && c0 - m0 < goal)) + __popc(__ballot_sync(~0u, lane + 32 < k && c1 - m1 < goal));
        k = max(k, 1);
        total = k > 32 ? __shfl_sync(~0u, c1, k - 33) : __shfl_sync(~0u, c0, k - 1);
      }
      const float goal = greedy ? 0.f : uniform(seed, frame, codebook) * total;
      const u32 b0 = __ballot_sync(~0u, lane < k && c0 > goal), b1 = __ballot_sync(~0u, lane + 32 < k && c1 > goal);
      if (lane == 0) {
        int code = s.sorted_ids[b0 ? __ffs(b0) - 1 : b1 ? 31 + __ffs(b1) : k - 1];
        if (FIRST) {
          if (code == given.stop_id) s.alive[slot] = 0;
          if (!s.alive[slot]) code = 0;
        }
        s.code[slot][codebook] = code;
      }
    }
    workers_meet();
  }
  mark(5);
}

// ---- attention: a block takes a key head, and a share of its cache ----

__device__ __forceinline__ int length_of(int slot) { return min(s.prompt[slot] + s.frame[slot], given.capacity - 1); }
__device__ __forceinline__ int n_splits(int length) { return greater(1, lesser(MOST_SPLITS, divided(length, SHARE))); }

// The predictor's: a warp takes a position or two. Blocks that have a head call it.
template <int COLUMNS>
__device__ __noinline__ void attend_small(u32 number, int layer, int given_past) {
  constexpr int each = divided(Q, WARPS);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, slot = blockIdx.x / PG, group = blockIdx.x % PG;
  const Gains<E> gains(given.small_gains, layer);
  const u64 cache = ((u64)(layer * SLOTS + slot) * PG + group) * Q * HD + 4 * lane;
#pragma unroll 1
  for (int column = slot; column < COLUMNS; column += SLOTS) {
    const int past = given_past + column / SLOTS;
    uint2 key[each], value[each];
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (warp + i * WARPS < past) {
        key[i] = load8(given.small_keys + cache + (warp + i * WARPS) * HD);
        value[i] = load8(given.small_values + cache + (warp + i * WARPS) * HD);
      }
    if (warp < SMALL_REPEATS + 2) {
      const Turn turn(warp < SMALL_REPEATS ? gains.query : gains.key, given.small_cos, given.small_sin, past);
      const int head = warp < SMALL_REPEATS ? group * SMALL_REPEATS + warp : PH + group + (warp - SMALL_REPEATS) * PG;
      const uint2 four = receive(number - 1, column * SMALL_QKV_N + head * HD + 4 * lane);
      if (warp == SMALL_REPEATS + 1) {
        *(uint2*)(given.small_values + cache + past * HD) = four;
        *(uint2*)(s.past_values[past] + 4 * lane) = four;
      } else {
        float x[4];
        unpack(four, x);
        turn(x, given.small_eps);
        if (warp == SMALL_REPEATS) *(uint2*)(given.small_keys + cache + past * HD) = packed(x);
        *(float4*)(s.fresh[warp] + 4 * lane) = make_float4(x[0], x[1], x[2], x[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (warp + i * WARPS < past) *(uint2*)(s.past_values[warp + i * WARPS] + 4 * lane) = value[i];
    workers_meet();
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int position = warp + i * WARPS;
      if (position > past) {
        if (position < Q && lane < SMALL_REPEATS) s.scores[lane][position] = -1e30f;
        continue;
      }
      float k[4], score[SMALL_REPEATS];
      if (position < past) {
        unpack(key[i], k);
      } else {
        const float4 fresh = *(const float4*)(s.fresh[SMALL_REPEATS] + 4 * lane);
        k[0] = fresh.x, k[1] = fresh.y, k[2] = fresh.z, k[3] = fresh.w;
      }
#pragma unroll
      for (int r = 0; r < SMALL_REPEATS; ++r) {
        const float4 q = *(const float4*)(s.fresh[r] + 4 * lane);
        score[r] = q.x * k[0] + q.y * k[1] + q.z * k[2] + q.w * k[3];
      }
      const float sum = warp_sums<SMALL_REPEATS>(score) * rsqrtf((float)HD);
      if (lane % (32 / SMALL_REPEATS) == 0) s.scores[lane / (32 / SMALL_REPEATS)][position] = sum;
    }
    workers_meet();
    // Four threads share two outputs: each takes a quarter of the positions, those that are not there with a weight of zero.
    constexpr int quarter = Q / 4;
#pragma unroll 1
    for (int out = tid >> 2; out < SMALL_REPEATS * HD / 2; out += WORKERS / 4) {
      const int r = out / (HD / 2), dim = 2 * (out % (HD / 2)), first = (tid & 3) * quarter;
      float score[quarter], top = -1e30f, total = 0.f, x = 0.f, y = 0.f;
#pragma unroll
      for (int i = 0; i < quarter; ++i) score[i] = s.scores[r][first + i], top = fmaxf(top, score[i]);
#pragma unroll
      for (int d = 1; d < 4; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
#pragma unroll
      for (int i = 0; i < quarter; ++i) {
        const float by = __expf(score[i] - top);
        const u32 both = *(const u32*)(s.past_values[first + i] + dim);
        total += by, x += by * bf_low(both), y += by * bf_high(both);
      }
#pragma unroll
      for (int d = 1; d < 4; d <<= 1)
        total += __shfl_xor_sync(~0u, total, d), x += __shfl_xor_sync(~0u, x, d), y += __shfl_xor_sync(~0u, y, d);
      const float by = __fdividef(1.f, total);
      if ((tid & 3) == 0)
        send(outbox(number) + (column * PH * HD + (group * SMALL_REPEATS + r) * HD + dim) / 2, number, two_bf(x * by, y * by));
    }
    if (column + SLOTS < COLUMNS) workers_meet();
  }
}

// The talker's: a warp takes every sixteenth position, four at a time. Shares are joined where they are read.
__device__ __noinline__ void attend(u32 number, int layer) {
  constexpr int repeats = H / G, M = 4;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const Gains<D> gains(given.gains, layer);
  float* sums = s.attended;                             // [WARPS, repeats, HEAD_PITCH]
  float* fresh = sums + WARPS * repeats * HEAD_PITCH;   // queries, the new key, the new value
  float* peaks = fresh + (repeats + 2) * HEAD_PITCH;
  float* weights = peaks + WARPS * repeats;
#pragma unroll 1
  for (int unit = blockIdx.x; unit < SLOTS * G * MOST_SPLITS; unit += GRID) {
    const int split = unit / (SLOTS * G), slot = unit % (SLOTS * G) / G, group = unit % G;
    const int past = length_of(slot), splits = n_splits(past + 1);
    if (split >= splits) continue;
    const bool last = split == splits - 1;
    const u64 cache = ((u64)(layer * SLOTS + slot) * G + group) * given.capacity * HD + 4 * lane;
    const int share = divided(past + 1, splits), end = min(past + 1, (split + 1) * share);
    int start = split * share + warp;
    uint2 keys[M], values[M];
    // All but the newest, which is on its way, are asked for before it is there.
    auto ask = [&]() {
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const int position = start + i * WARPS;
        keys[i] = values[i] = make_uint2(0, 0);
        if (position < min(end, past)) {
          keys[i] = load8(given.keys + cache + (u64)position * HD);
          values[i] = load8(given.values + cache + (u64)position * HD);
        }
      }
    };
    ask();
    if (warp < repeats + 2) {
      const Turn turn(warp < repeats ? gains.query : gains.key, given.cos, given.sin, past);
      const int head = warp < repeats ? group * repeats + warp : H + group + (warp - repeats) * G;
      float x[4];
      unpack(receive(number - 1, slot * QKV_N + head * HD + 4 * lane), x);
      if (warp <= repeats) turn(x, given.eps);
      if (last && warp >= repeats) *(uint2*)((warp == repeats ? given.keys : given.values) + cache + (u64)past * HD) = packed(x);
      if (warp >= repeats) *(uint2*)(fresh + warp * HEAD_PITCH + 4 * lane) = packed(x);
      else *(float4*)(fresh + warp * HEAD_PITCH + 4 * lane) = make_float4(x[0], x[1], x[2], x[3]);
    }
    workers_meet();
    float q[repeats][4];
    Softmax part[repeats];
#pragma unroll
    for (int r = 0; r < repeats; ++r) {
      const float4 v = *(const float4*)(fresh + r * HEAD_PITCH + 4 * lane);
      q[r][0] = v.x, q[r][1] = v.y, q[r][2] = v.z, q[r][3] = v.w;
    }
    const uint2 new_key = *(const uint2*)(fresh + repeats * HEAD_PITCH + 4 * lane);
    const uint2 new_value = *(const uint2*)(fresh + (repeats + 1) * HEAD_PITCH + 4 * lane);
#pragma unroll 1
    for (bool more = false; start < end; start += M * WARPS, more = true) {
      if (more) ask();
#pragma unroll
      for (int i = 0; i < M; ++i)
        if (start + i * WARPS == past) keys[i] = new_key, values[i] = new_value;
#pragma unroll
      for (int r = 0; r < repeats; ++r) part[r].template add<M>(q[r], keys, values, divided(end - start, WARPS));
    }
#pragma unroll
    for (int r = 0; r < repeats; ++r) {
      if (lane == 0) peaks[warp * repeats + r] = part[r].peak, weights[warp * repeats + r] = part[r].weight;
      *(float4*)(sums + (warp * repeats + r) * HEAD_PITCH + 4 * lane) = make_float4(part[r].o[0], part[r].o[1], part[r].o[2], part[r].o[3]);
    }
    workers_meet();
    // Four threads join two outputs of all warps.
#pragma unroll 1
    for (int out = tid >> 2; out < repeats * HD / 2; out += WORKERS / 4) {
      const int r = out / (HD / 2), dim = 2 * (out % (HD / 2)), quarter = tid & 3;
      float peak[WARPS / 4], top = -1e30f, total = 0.f, x = 0.f, y = 0.f;
#pragma unroll
      for (int i = 0; i < WARPS / 4; ++i) peak[i] = peaks[(quarter + 4 * i) * repeats + r], top = fmaxf(top, peak[i]);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
#pragma unroll
      for (int i = 0; i < WARPS / 4; ++i) {
        const int w = (quarter + 4 * i) * repeats + r;
        const float fade = __expf(peak[i] - top);
        const float2 sum = *(const float2*)(sums + w * HEAD_PITCH + dim);
        total += fade * weights[w], x += fade * sum.x, y += fade * sum.y;
      }
#pragma unroll
      for (int d = 1; d < 4; d <<= 1)
        total += __shfl_xor_sync(~0u, total, d), x += __shfl_xor_sync(~0u, x, d), y += __shfl_xor_sync(~0u, y, d);
      const float by = __fdividef(1.f, total);
      const int at = (slot * H + group * repeats + r) * MOST_SPLITS + split;
      if (quarter == 0) {
        store(given.parts + (u64)at * (HD / 2) + dim / 2, make_uint2(two_bf(x * by, y * by), number));
        if (dim == 0) store(given.part_weights + (u64)at * 2, make_uint4(__float_as_uint(top), number, __float_as_uint(total), number));
      }
    }
    workers_meet();
  }
}

// ---- the predictor ----

// A step: the first has two rows a slot.
template <int COLUMNS>
__device__ __forceinline__ Place predict(Place place, u32& exchange, int codebook) {
#pragma unroll 1
  for (int layer = 0; layer < PL; ++layer) {
    const Gains<E> gains(given.small_gains, layer);
    place = product<SMALL_QKV, COLUMNS>(place, {gains.attention, layer == 0, codebook}, ++exchange, given.small_eps);
    ++exchange;
    if (blockIdx.x < SLOTS * PG) attend_small<COLUMNS>(exchange, layer, COLUMNS > SLOTS ? 0 : codebook);
    mark(6);
    place = product<SMALL_OUT, COLUMNS>(place, {}, ++exchange, 0.f);
    place = product<SMALL_GATE_UP, COLUMNS>(place, {gains.mlp}, ++exchange, given.small_eps);
    place = product<SMALL_DOWN, COLUMNS>(place, {}, ++exchange, 0.f);
  }
  const u16* gain = Gains<E>(given.small_gains, PL).attention;
  place = product<HEAD, SLOTS>(place, {gain, false, 0, COLUMNS - SLOTS}, ++exchange, given.small_eps);
  sample<W, false>(exchange, codebook);
  return place;
}

// ---- the talker ----

// Joins the shares of all heads into s.x.
__device__ __forceinline__ void stage_attended(int tid, u32 number) {
  const int lane = tid & 31, warp = tid >> 5;
#pragma unroll 1
  for (int unit = warp; unit < SLOTS * H; unit += WARPS) {
    const int slot = unit / H, head = unit % H, splits = n_splits(length_of(slot) + 1);
    const u64 at = (u64)unit * MOST_SPLITS;
    const u64* parts = given.parts + at * (HD / 2) + 2 * lane;
    uint2 got[1];
    const bool always[1] = {true};
    if (splits == 1) {
      const u64* const whole[1] = {parts};
      receive<1>(got, whole, always, number);
      put<OUT>(tid, slot, head * HD + 4 * lane, got[0]);
      continue;
    }
    const u64* const weights[1] = {given.part_weights + (at + min(lane, splits - 1)) * 2};
    receive<1>(got, weights, always, number);
    float top = lane < splits ? __uint_as_float(got[0].x) : -1e30f;
    const float peak = top, weight = __uint_as_float(got[0].y);
#pragma unroll
    for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    float fade = lane < splits ? __expf(peak - top) * weight : 0.f, o[4] = {0.f, 0.f, 0.f, 0.f};
    fade = __fdividef(fade, warp_sum(fade));
#pragma unroll 1
    for (int split = 0; split < splits; split += 4) {
      uint2 x[4];
      const u64* from[4];
      bool wanted[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) from[i] = parts + (split + i) * (HD / 2), wanted[i] = split + i < splits, x[i] = make_uint2(0, 0);
      receive<4>(x, from, wanted, number);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float by = __shfl_sync(~0u, fade, (split + i) & 31);
        float y[4];
        unpack(x[i], y);
#pragma unroll
        for (int j = 0; j < 4; ++j) o[j] += by * y[j];
      }
    }
    put<OUT>(tid, slot, head * HD + 4 * lane, packed(o));
  }
  // Where a warp multiplies another's head.
  if constexpr (!Share<OUT>::HEADS) workers_meet();
}

__device__ __forceinline__ Place talk(Place place, u32& exchange) {
  int splits = 0;
  for (int slot = 0; slot < SLOTS; ++slot) splits = max(splits, n_splits(length_of(slot) + 1));
#pragma unroll 1
  for (int layer = 0; layer < L; ++layer) {
    const Gains<D> gains(given.gains, layer);
    place = product<QKV, SLOTS>(place, {gains.attention, layer == 0}, ++exchange, given.eps);
    ++exchange;
    if (blockIdx.x < SLOTS * G * splits) attend(exchange, layer);
    mark(6);
    place = product<OUT, SLOTS>(place, {}, ++exchange, 0.f);
    place = product<GATE_UP, SLOTS>(place, {gains.mlp}, ++exchange, given.eps);
    place = product<DOWN, SLOTS>(place, {}, ++exchange, 0.f);
  }
  return place;
}

// The hidden states, normed: block 0 writes them.
__device__ __forceinline__ void conclude(u32 number) {
  constexpr int each = divided(D / GROUP, WARPS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
  for (int slot = 0; slot < SLOTS; ++slot) {
    float x[each][4], square = 0.f;
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (warp + i * WARPS < D / GROUP) {
        unpack(receive(number, slot * D + (warp + i * WARPS) * GROUP + 4 * lane), x[i]);
        square += dot(x[i], x[i]);
      }
    square = warp_sum(square);
    if (lane == 0) s.squares[0][slot][warp] = square;
    workers_meet();
    const float rstd = rsqrtf(warp_sum(lane < WARPS ? s.squares[0][slot][lane] : 0.f) * (1.f / D) + given.eps);
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (warp + i * WARPS < D / GROUP) {
        const int at = (warp + i * WARPS) * GROUP + 4 * lane;
        float b[4];
        unpack(load8(Gains<D>(given.gains, L).attention + at), b);
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] *= rounded(x[i][j] * rstd);
        *(uint2*)(given.hidden + slot * D + at) = packed(b);
      }
  }
}

// ---- the frame ----

__device__ __forceinline__ void feed_all() {
  Place place{thread()};
  const u64 once = leaves_first(), small = PREDICTOR_INT4 ? leaves_last() : once;
  constexpr int LAYERS = 1 + PROJECTED, HEADS = LAYERS + 4 * PL, TALKER = HEADS + Q - 1;
  place = feed(place, HEAD0, 0, once);
  if (PROJECTED) place = feed(place, PROJECTION, 1, once);
#pragma unroll 1
  for (int codebook = 1; codebook < Q; ++codebook) {
#pragma unroll 1
    for (int i = 0; i < 4 * PL; ++i) place = feed(place, SMALL_QKV + i % 4, LAYERS + i, small);
    place = feed(place, HEAD, HEADS + codebook - 1, once);
  }
#pragma unroll 1
  for (int i = 0; i < 4 * L; ++i) place = feed(place, QKV + i % 4, TALKER + i, once);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) frame(const __grid_constant__ Arguments arguments) {
  const int tid = threadIdx.x;
  if (tid == 0) {
    for (int i = 0; i < RING; ++i) {
      set_up(&s.full[i], 1);
      set_up(&s.empty[i], WARPS);
    }
    all_set_up();
    s.n_marks = 0, s.ring_waits = 0, s.nibbles = 0x0f0f0f0fu;
  }
  for (int i = tid; i < sizeof(s.past_values) / 4; i += THREADS) ((u32*)s.past_values)[i] = 0;
  for (int i = tid; i < sizeof(Arguments) / 8; i += THREADS) ((u64*)&given)[i] = ((const u64*)&arguments)[i];
  if (tid < SLOTS) s.frame[tid] = arguments.frame[tid], s.alive[tid] = arguments.alive[tid], s.prompt[tid] = arguments.prompt[tid];
  __syncthreads();
  if (tid >= WORKERS) {
    feed_all();
    return;
  }
  mark(0);
  Place place{thread()};
  u32 exchange = *given.exchange;
  place = product<HEAD0, SLOTS>(place, {}, ++exchange, 0.f);
  const u32 logits = exchange;
  // Of the same rows.
  if constexpr (PROJECTED) place = product<PROJECTION, SLOTS>(place, {}, ++exchange, 0.f);
  sample<V, true>(logits, 0);
  place = predict<2 * SLOTS>(place, exchange, 1);
#pragma unroll 1
  for (int codebook = 2; codebook < Q; ++codebook) place = predict<SLOTS>(place, exchange, codebook);
  talk(place, exchange);
  if (blockIdx.x != 0) return;
  conclude(exchange);
  if (tid == 0) *given.exchange = exchange;
  if (tid < SLOTS * Q) {
    const int slot = tid / Q, codebook = tid % Q;
    given.codes[(min(s.frame[slot], given.capacity - 1) * SLOTS + slot) * Q + codebook] = s.alive[slot] ? s.code[slot][codebook] : ENDED;
  }
  if (tid < SLOTS) {
    // What was drawn counts as said, and a slot that stopped said the stop.
    given.seen[tid * V + (s.alive[tid] || !given.alive[tid] ? s.code[tid][0] : given.stop_id)] = 1;
    given.alive[tid] = s.alive[tid];
    given.past[tid] = length_of(tid);
    given.frame[tid] = s.frame[tid] + (s.alive[tid] ? 1 : 0);
  }
}
