// One frame of speech as one kernel that stays on the GPU from the first logits to the next hidden state.
//
// Every multiprocessor holds one block. One of its warps does nothing but ask for weights: which tiles a block reads, and
// in which order, is known beforehand, so they stream through a ring in shared memory without ever waiting for what is
// computed. The other warps multiply tiles as they come and meet all other blocks where a product is done.
//
// Rows of activations are the columns (N) of the tensor cores' m16n8k16, weights its rows: up to eight rows cost as much
// as one. Fragments are read from weights as they lie in memory; the order of inputs within a step is free as long as
// activations follow the same one. Shapes as in frame.py; macros give the model's, see persistent.py.
//
// GRID blocks; SLOTS utterances; D, I, H, G, L: width, inner width, heads, key heads, layers of the talker; E, J, PH, PG,
// PL of the predictor; V, W ids of the first and of the other codebooks; Q codebooks; CAPACITY positions; LINES of text.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int HD = 128, GROUP = 128;
constexpr int WARPS = 16, WORKERS = 32 * WARPS;
constexpr int SLOT_BYTES = 16384, MOST_RING = 32, MOST_SHARED = 232448;
constexpr int MIN_FRAMES = 2, ENDED = -1;
constexpr u32 MOST_TRIES = 1u << 24;
constexpr int COLS = 2 * SLOTS;

constexpr int greater(int a, int b) { return a > b ? a : b; }
constexpr int lesser(int a, int b) { return a < b ? a : b; }
constexpr int divided(int a, int b) { return (a + b - 1) / b; }

// Rows of a tile: sixteen where they fit into one slot of the ring and keep all blocks busy, else eight.
constexpr int rows_of(int n, int row_bytes) {
  const int wide = divided(n / 16, GRID) * 16, narrow = divided(n / 8, GRID) * 8;
  return n % 16 == 0 && wide <= narrow && 16 * row_bytes <= SLOT_BYTES ? 16 : 8;
}

// A product's weight: N_ outputs of K_ inputs, in tiles of R rows. GATED_: gate above up, a tile has as many rows of each.
template <int N_, int K_, bool INT4_, bool GATED_>
struct Shape {
  static constexpr int N = N_, K = K_;
  static constexpr bool INT4 = INT4_, GATED = GATED_;
  static constexpr int ROW_BYTES = INT4 ? K / 2 : 2 * K;
  static constexpr int R = rows_of(GATED ? 2 * N : N, ROW_BYTES);
  static constexpr int PIECES = GATED ? 2 : 1, OUT = R / PIECES;  // runs of rows of a tile; its outputs
  static constexpr int TILES = N / OUT;
  static constexpr int SEGMENTS = divided(ROW_BYTES * R, SLOT_BYTES);
  static constexpr int SEGMENT = ROW_BYTES / SEGMENTS;  // bytes of a row in one slot of the ring
  static constexpr int GROUPS = K / GROUP;
  static constexpr int TABLE_BYTES = INT4 ? R * GROUPS * 3 : 0;  // float16 scales, then zero points, of the whole tile
  static_assert(N % OUT == 0 && OUT % 2 == 0 && ROW_BYTES % SEGMENTS == 0 && SEGMENT % 64 == 0 && K % GROUP == 0,
                "rows must split evenly");
  static_assert(!INT4 || OUT * GROUPS % 16 == 0, "zero points are copied 16 at a time");
};

typedef Shape<V, D, false, false> Head0;
typedef Shape<E, D, false, false> Projection;
typedef Shape<(H + 2 * G) * HD, D, TALKER_INT4, false> Qkv;
typedef Shape<D, H * HD, TALKER_INT4, false> Out;
typedef Shape<I, D, TALKER_INT4, true> GateUp;
typedef Shape<D, I, TALKER_INT4, false> Down;
typedef Shape<(PH + 2 * PG) * HD, E, PREDICTOR_INT4, false> SmallQkv;
typedef Shape<E, PH * HD, PREDICTOR_INT4, false> SmallOut;
typedef Shape<J, E, PREDICTOR_INT4, true> SmallGateUp;
typedef Shape<E, J, PREDICTOR_INT4, false> SmallDown;
typedef Shape<W, E, false, false> Head;

constexpr int TABLE_ROOM = divided(
    greater(greater(greater(Qkv::TABLE_BYTES, Out::TABLE_BYTES), greater(GateUp::TABLE_BYTES, Down::TABLE_BYTES)),
            greater(greater(SmallQkv::TABLE_BYTES, SmallOut::TABLE_BYTES),
                    greater(SmallGateUp::TABLE_BYTES, SmallDown::TABLE_BYTES))), 128) * 128;
constexpr int RING_SLOT = SLOT_BYTES + TABLE_ROOM;
constexpr int WIDEST = greater(greater(greater(D, I), H * HD) * SLOTS, greater(greater(E, J), PH * HD) * COLS);
constexpr int WIDE_D = greater(D * SLOTS, E * COLS);
constexpr int REP = H / G;
constexpr int RED_FLOATS = greater(16 * WARPS * 8, WARPS * REP * (HD + 2) + (REP + 2) * HD);

struct Weight { const u8* values; const u8* scales; const u8* zeros; };
constexpr int WEIGHTS = 1 + PROJECTED + 4 * PL + (Q - 1) + 4 * L;

struct Arguments {
  const u16* gains;               // [layers][before attention, of a query, of a key, before the MLP], the talker's
  const u16* small_gains;         // and the predictor's; behind the last layer's stands the norm after all of them
  const u16* projection_bias;
  u16* keys; u16* values;         // the talker's cache [L, SLOTS, G, CAPACITY, d]
  u16* small_keys; u16* small_values;  // the predictor's [PL, SLOTS, PG, Q, d]
  const u16* cos; const u16* sin; const u16* small_cos; const u16* small_sin;  // [positions, d / 2]
  const u64* seed; int* frame; int* past; const int* prompt; const int* n_text; int* alive; u8* seen;
  const float* first; const float* residual;
  const u16* texts; int* codes; float* stops;
  u16* hidden;
  u64* boxes;                     // [4, BOX] what blocks hand each other, and
  u64* parts; u64* part_weights;  // [SLOTS, H, splits, d] and [SLOTS, H, splits, 2]
  u32* exchange;                  // how many exchanges there were before this frame
  u64* trace;
  float eps, small_eps;
  int stop_id, n_banned;
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

// ---- bits of PTX ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float bf(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float bf_low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float bf_high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ u32 two_bf(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ u16 to_bf(float x) { return (u16)two_bf(x, 0.f); }
__device__ __forceinline__ float rounded(float x) { return bf(to_bf(x)); }
__device__ __forceinline__ float half(u16 x) {
  float r;
  asm("{.reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "h"(x));
  return r;
}
// Not from the first-level cache: another block may have written it while the kernel runs.
__device__ __forceinline__ uint2 load8(const void* p) {
  uint2 r;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ void barrier(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
__device__ __forceinline__ void workers_meet() { barrier(1, WORKERS); }

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// ---- the ring ----

struct Shared {
  u64 full[MOST_RING], empty[MOST_RING];
  u64 ring_waits;
  int n_marks;
  alignas(16) float red[RED_FLOATS];
  float squares[WIDE_D / GROUP];
  float sums[WIDEST / GROUP];
  int code[SLOTS][Q];
  int frame[SLOTS], alive[SLOTS], prompt[SLOTS];
  float picked[SLOTS][3 * 64 + 64];
  int counts[SLOTS][16];
  alignas(16) u16 x[WIDEST];    // a product's activations, in the order in which its weight is read
  alignas(16) u16 raw[WIDE_D];  // the residual stream as it came in
};

constexpr int RING = lesser(MOST_RING, (MOST_SHARED - (int)sizeof(Shared)) / RING_SLOT);
static_assert(RING >= 4, "the model's rows leave no room for its weights");

// An error is better than a GPU that never comes back.
__device__ __forceinline__ void give_up(u32 tries) {
  if (tries > MOST_TRIES) asm volatile("trap;");
}
__device__ __forceinline__ void wait_for(u64* gate, u32 parity) {
  u32 passed, tries = 0;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(passed) : "r"(shared_address(gate)), "r"(parity) : "memory");
    give_up(++tries);
  } while (!passed);
}
__device__ __forceinline__ void arrive(u64* gate) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" ::"r"(shared_address(gate)) : "memory");
}
__device__ __forceinline__ void expect(u64* gate, u32 n_bytes) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}"
               ::"r"(shared_address(gate)), "r"(n_bytes) : "memory");
}
__device__ __forceinline__ void fetch(void* to, const void* from, u32 n_bytes, u64* gate, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(shared_address(to)), "l"(from), "r"(n_bytes), "r"(shared_address(gate)), "l"(policy) : "memory");
}

struct Place {
  int slot = 0, base = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == RING) slot = 0, parity ^= 1;
  }
  // Tiles are dealt in turn over all products, so that no block has more to read than another.
  __device__ __forceinline__ int begin() const {
    int first = (int)blockIdx.x - base;
    return first < 0 ? first + GRID : first;
  }
  template <class S> __device__ __forceinline__ void end() { base = (base + S::TILES) % GRID; }
};

template <class S>
__device__ void feed(const Weight& weight, Place& place, Shared& s, u8* ring, u64 policy) {
  const int lane = threadIdx.x & 31;
  for (int tile = place.begin(); tile < S::TILES; tile += GRID) {
    for (int segment = 0; segment < S::SEGMENTS; ++segment) {
      wait_for(&s.empty[place.slot], place.parity ^ 1);
      u8* to = ring + (u64)place.slot * RING_SLOT;
      u64* gate = &s.full[place.slot];
      if (lane == 0) expect(gate, S::R * S::SEGMENT + S::TABLE_BYTES);
      __syncwarp();
      if (S::SEGMENTS == 1) {
        // Whole rows lie one behind the other.
        if (lane < S::PIECES)
          fetch(to + lane * S::OUT * S::ROW_BYTES, weight.values + (u64)(tile * S::OUT + lane * S::N) * S::ROW_BYTES,
                S::OUT * S::ROW_BYTES, gate, policy);
      } else if (lane < S::R) {
        const int row = tile * S::OUT + lane % S::OUT + (lane >= S::OUT ? S::N : 0);
        fetch(to + lane * S::SEGMENT, weight.values + (u64)row * S::ROW_BYTES + segment * S::SEGMENT, S::SEGMENT, gate, policy);
      }
      if (S::INT4 && lane >= 16 && lane < 16 + 2 * S::PIECES) {
        const int piece = (lane - 16) >> 1, row = tile * S::OUT + piece * S::N, at = piece * S::OUT * S::GROUPS;
        if (lane & 1)
          fetch(to + SLOT_BYTES + 2 * S::R * S::GROUPS + at, weight.zeros + (u64)row * S::GROUPS, S::OUT * S::GROUPS, gate, policy);
        else
          fetch(to + SLOT_BYTES + 2 * at, weight.scales + 2 * (u64)row * S::GROUPS, 2 * S::OUT * S::GROUPS, gate, policy);
      }
      place.next();
    }
  }
  place.end<S>();
}

// The moments of one block's frame, where they are asked for: 1 rows are ready, 2 sent, 3 drawn, 4 and 5 attended.
__device__ __forceinline__ void mark(const Arguments& a, Shared& s, int what) {
  if (TRACED && blockIdx.x == TRACED - 1 && threadIdx.x == 0) {
    u64* at = a.trace + 4 * s.n_marks++;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(at[3]) :: "memory");
    at[0] = (u64)clock64(), at[1] = what, at[2] = s.ring_waits;
  }
}

// ---- mail: what blocks hand each other ----
//
// Every four bytes travel with the number of their exchange, eight bytes written at once, and are read again and again until
// that number is there. So nobody waits for more than what he needs, and no fence is needed between the two. Boxes are
// taken in turn, four of them: a block writes into the one of exchange n + 4 only when all that was sent in n + 3 is there,
// which took all of n + 2, and so on; and of any two products in a row every block has a tile of one (checked below), so
// by then everyone has read exchange n.

constexpr int BOXES = 4;
constexpr int BOX = greater(greater(greater(Qkv::N, I), greater(V, D)) * SLOTS, greater(SmallQkv::N, greater(J, E)) * COLS) / 2;

__device__ __forceinline__ void send(const Arguments& a, u32 number, int pair, u32 what) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};"
               ::"l"(a.boxes + (u64)(number % BOXES) * BOX + pair), "r"(what), "r"(number) : "memory");
}
__device__ __forceinline__ void send_floats(u64* to, u32 number, float x, float y) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %2};"
               ::"l"(to), "r"(__float_as_uint(x)), "r"(number), "r"(__float_as_uint(y)) : "memory");
}
__device__ __forceinline__ uint2 receive_from(const u64* from, u32 number) {
  u32 x, y, m, n, tries = 0;
  do {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x), "=r"(m), "=r"(y), "=r"(n) : "l"(from) : "memory");
    give_up(++tries);
  } while (m != number || n != number);
  return make_uint2(x, y);
}
// Four bfloat16 of exchange ``number``, from the ``at``-th on.
__device__ __forceinline__ uint2 receive(const Arguments& a, u32 number, int at) {
  return receive_from(a.boxes + (u64)(number % BOXES) * BOX + at / 2, number);
}

// ---- products ----

// Sends the product of the N rows in s.x: its outputs in pairs, as ``finish`` makes them of float32.
template <class S, int N, class Finish>
__device__ void product(const Arguments& a, Place& place, Shared& s, u8* ring, u32& exchange, Finish finish) {
  const u32 number = ++exchange;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
  constexpr int BATCH = greater(1, 8 / N);
  constexpr int K_SEGMENT = S::K / S::SEGMENTS;
  int tile = place.begin();
  while (tile < S::TILES) {
    int first = tile, done = 0;
    for (; done < BATCH && tile < S::TILES; ++done, tile += GRID) {
      float acc[4] = {0.f, 0.f, 0.f, 0.f};
      for (int segment = 0; segment < S::SEGMENTS; ++segment) {
        const long long before = TRACED ? clock64() : 0;
        wait_for(&s.full[place.slot], place.parity);
        if (TRACED && tid == 0) s.ring_waits += clock64() - before;
        const u8* from = ring + (u64)place.slot * RING_SLOT;
        if (S::INT4) {
          for (int group = warp; group < K_SEGMENT / GROUP; group += WARPS) {
            const int in_row = segment * (K_SEGMENT / GROUP) + group;
            uint4 low = *(const uint4*)(from + g * S::SEGMENT + group * 64 + t * 16);
            uint4 high = S::R == 16 ? *(const uint4*)(from + (g + 8) * S::SEGMENT + group * 64 + t * 16) : make_uint4(0, 0, 0, 0);
            float c[4] = {0.f, 0.f, 0.f, 0.f};
            const u16* mine = s.x + g * S::K + in_row * GROUP + t * 32;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              uint4 b = g < N ? *(const uint4*)(mine + e * 8) : make_uint4(0, 0, 0, 0);
              u32 w = e == 0 ? low.x : e == 1 ? low.y : e == 2 ? low.z : low.w;
              u32 v = e == 0 ? high.x : e == 1 ? high.y : e == 2 ? high.z : high.w;
              u32 p[4], q[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                p[i] = ((w >> (4 * i)) & 0x000f000fu) | 0x43004300u;  // 128 + the nibble, two bfloat16
                q[i] = S::R == 16 ? ((v >> (4 * i)) & 0x000f000fu) | 0x43004300u : 0u;
              }
              multiply(c, p[0], q[0], p[1], q[1], b.x, b.y);
              multiply(c, p[2], q[2], p[3], q[3], b.z, b.w);
            }
            const u16* scales = (const u16*)(from + SLOT_BYTES);
            const u8* zeros = from + SLOT_BYTES + 2 * S::R * S::GROUPS;
            if (2 * t < N) {
              float sum0 = s.sums[(2 * t) * S::GROUPS + in_row];
              float sum1 = 2 * t + 1 < N ? s.sums[(2 * t + 1) * S::GROUPS + in_row] : 0.f;
              float scale = half(scales[g * S::GROUPS + in_row]), zero = 128.f + zeros[g * S::GROUPS + in_row];
              acc[0] += scale * (c[0] - zero * sum0);
              acc[1] += scale * (c[1] - zero * sum1);
              if (S::R == 16) {
                scale = half(scales[(g + 8) * S::GROUPS + in_row]), zero = 128.f + zeros[(g + 8) * S::GROUPS + in_row];
                acc[2] += scale * (c[2] - zero * sum0);
                acc[3] += scale * (c[3] - zero * sum1);
              }
            }
          }
        } else {
          for (int step = warp; step < K_SEGMENT / 32; step += WARPS) {
            uint4 low = *(const uint4*)(from + g * S::SEGMENT + step * 64 + t * 16);
            uint4 high = S::R == 16 ? *(const uint4*)(from + (g + 8) * S::SEGMENT + step * 64 + t * 16) : make_uint4(0, 0, 0, 0);
            uint4 b = g < N ? *(const uint4*)(s.x + g * S::K + segment * K_SEGMENT + step * 32 + t * 8) : make_uint4(0, 0, 0, 0);
            multiply(acc, low.x, high.x, low.y, high.y, b.x, b.y);
            multiply(acc, low.z, high.z, low.w, high.w, b.z, b.w);
          }
        }
        __syncwarp();
        if (lane == 0) arrive(&s.empty[place.slot]);
        place.next();
      }
      float* red = s.red + (done * WARPS + warp) * S::R * N;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int column = 2 * t + (i & 1), row = g + (i >> 1) * 8;
        if (column < N && row < S::R) red[row * N + column] = acc[i];
      }
    }
    workers_meet();
    // Four threads add up two outputs.
    for (int out = tid; out < done * S::OUT / 2 * N * 4; out += WORKERS) {
      const int part = out & 3, which = (out >> 2) / (S::OUT / 2 * N), inside = (out >> 2) % (S::OUT / 2 * N);
      const int row = 2 * (inside / N), column = inside % N;
      const float* red = s.red + ((which * WARPS + part) * S::R + row) * N + column;
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < WARPS; w += 4) {
        const float* from = red + w * S::R * N;
        sums[0] += from[0], sums[1] += from[N];
        if (S::GATED) sums[2] += from[S::OUT * N], sums[3] += from[(S::OUT + 1) * N];
      }
      const u32 quad = 0xfu << (lane & ~3);
#pragma unroll
      for (int i = 0; i < (S::GATED ? 4 : 2); ++i) {
        sums[i] += __shfl_xor_sync(quad, sums[i], 1);
        sums[i] += __shfl_xor_sync(quad, sums[i], 2);
      }
      if (S::GATED) {
        sums[0] = sums[0] / (1.f + __expf(-sums[0])) * sums[2];
        sums[1] = sums[1] / (1.f + __expf(-sums[1])) * sums[3];
      }
      if (part == 0) {
        const int at = (first + which * GRID) * S::OUT + row;
        send(a, number, (column * S::N + at) / 2, finish(at, column, sums[0], sums[1]));
      }
    }
    if (tile < S::TILES) workers_meet();
  }
  place.end<S>();
  mark(a, s, 2);
}

struct Rounded {
  __device__ __forceinline__ u32 operator()(int, int, float x, float y) const { return two_bf(x, y); }
};

// ---- activations ----

// Four inputs of a group, from 4 * lane on, to where the weight's fragments want them.
template <bool INT4>
__device__ __forceinline__ void put(u16* group, int lane, uint2 four) {
  if (!INT4) {
    *(uint2*)(group + 4 * lane) = four;
  } else {
    int j = lane >> 2, t = lane & 3;
    u16* to = group + t * 32 + (j & 3) * 2 + (j >> 2);
    to[0] = (u16)four.x, to[8] = (u16)(four.x >> 16), to[16] = (u16)four.y, to[24] = (u16)(four.y >> 16);
  }
}

template <bool INT4>
__device__ __forceinline__ void put_summed(Shared& s, int column, int group, int k, int lane, uint2 four) {
  put<INT4>(s.x + column * k + group * GROUP, lane, four);
  if (INT4) {
    float sum = warp_sum(bf_low(four.x) + bf_high(four.x) + bf_low(four.y) + bf_high(four.y));
    if (lane == 0) s.sums[column * (k / GROUP) + group] = sum;
  }
}

// Puts N rows [K] into s.x as the next product wants them; ``value(column, at)`` gives four from the at-th on.
template <int K, int N, bool INT4, class Value>
__device__ void stage(const Arguments& a, Shared& s, Value value) {
  constexpr int GROUPS = K / GROUP, UNITS = divided(N * GROUPS, WARPS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const int unit = warp + i * WARPS, column = unit / GROUPS, group = unit % GROUPS;
    if (unit < N * GROUPS) put_summed<INT4>(s, column, group, K, lane, value(column, group * GROUP + 4 * lane));
  }
  workers_meet();
  mark(a, s, 1);
}

// The same after an RMS norm. With KEEP the rows as they came are left in s.raw.
template <int K, int N, bool INT4, bool KEEP, class Value>
__device__ void stage_normed(const Arguments& a, Shared& s, const u16* gain, float eps, Value value) {
  constexpr int GROUPS = K / GROUP, UNITS = divided(N * GROUPS, WARPS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint2 four[UNITS], by[UNITS];
  // What does not depend on other blocks is asked for before what does.
#pragma unroll
  for (int i = 0; i < UNITS; ++i) by[i] = load8(gain + (warp + i * WARPS) % GROUPS * GROUP + 4 * lane);
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const int unit = warp + i * WARPS, column = unit / GROUPS, group = unit % GROUPS;
    if (unit < N * GROUPS) {
      four[i] = value(column, group * GROUP + 4 * lane);
      if (KEEP) *(uint2*)(s.raw + column * K + group * GROUP + 4 * lane) = four[i];
      float x = bf_low(four[i].x), y = bf_high(four[i].x), z = bf_low(four[i].y), w = bf_high(four[i].y);
      float square = warp_sum(x * x + y * y + z * z + w * w);
      if (lane == 0) s.squares[column * GROUPS + group] = square;
    }
  }
  workers_meet();
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const int unit = warp + i * WARPS, column = unit / GROUPS, group = unit % GROUPS;
    if (unit < N * GROUPS) {
      float square = 0.f;
      for (int j = lane; j < GROUPS; j += 32) square += s.squares[column * GROUPS + j];
      float rstd = rsqrtf(warp_sum(square) / K + eps);
      u32 low = two_bf(bf_low(four[i].x) * rstd, bf_high(four[i].x) * rstd);
      u32 high = two_bf(bf_low(four[i].y) * rstd, bf_high(four[i].y) * rstd);
      uint2 normed = {two_bf(bf_low(low) * bf_low(by[i].x), bf_high(low) * bf_high(by[i].x)),
                      two_bf(bf_low(high) * bf_low(by[i].y), bf_high(high) * bf_high(by[i].y))};
      put_summed<INT4>(s, column, group, K, lane, normed);
    }
  }
  workers_meet();
  mark(a, s, 1);
}

__device__ __forceinline__ void unpack(uint2 four, float (&x)[4]) {
  x[0] = bf_low(four.x), x[1] = bf_high(four.x), x[2] = bf_low(four.y), x[3] = bf_high(four.y);
}
__device__ __forceinline__ uint2 packed(const float (&x)[4]) {
  return make_uint2(two_bf(x[0], x[1]), two_bf(x[2], x[3]));
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
    float rstd = rsqrtf(warp_sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) / HD + eps);
    float by[4], c[4], n[4];
    unpack(gain, by);
    unpack(cos, c);
    unpack(sin, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float mine = x[i] * rstd * by[i];
      float other = __shfl_xor_sync(~0u, mine, 16);
      x[i] = rounded(mine * c[i] + ((threadIdx.x & 16) ? other : -other) * n[i]);
    }
  }
};

__device__ __forceinline__ float dot(const float (&a)[4], const float (&b)[4]) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}

// ---- sampling: 128 threads a slot, the same in every block ----

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
  return ((x >> 8) + 0.5f) / 16777216.f;
}
__device__ __forceinline__ int ordered(float x) {
  int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

constexpr int MOST_KEPT = 64;

// One number of each of the slot's four warps, in order.
struct Four { int a, b, c, d; };
__device__ __forceinline__ Four shared_by_warps(Shared& s, int slot, int& turn_, int mine) {
  const int warp = (threadIdx.x >> 5) & 3;
  int* at = s.counts[slot] + 4 * (turn_++ & 3);
  if ((threadIdx.x & 31) == 0) at[warp] = mine;
  barrier(2 + slot, 128);
  return Four{at[0], at[1], at[2], at[3]};
}
__device__ __forceinline__ int before_me(const Four& f, int warp, int own_before) {
  return own_before + (warp > 0 ? f.a : 0) + (warp > 1 ? f.b : 0) + (warp > 2 ? f.c : 0);
}
__device__ __forceinline__ int warp_before(int x, int& total) {
  const int lane = threadIdx.x & 31;
  int sum = x;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    int y = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += y;
  }
  total = __shfl_sync(~0u, sum, 31);
  return sum - x;
}

// Draws a code in [0, IDS) for each slot into s.code[slot][codebook]; the likeliest first, equal ones from the lowest id.
template <int IDS, bool FIRST>
__device__ void sample(const Arguments& a, Shared& s, u32 number, int codebook) {
  constexpr int PER = IDS / 128;
  const int slot = threadIdx.x >> 7, tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5;
  if (slot < SLOTS) {
    int turn_ = 0;
    const float* knobs = (FIRST ? a.first : a.residual) + 4 * slot;
    const float temperature = knobs[0], top_p = knobs[2], penalty = knobs[3];
    const int frame = s.frame[slot];
    float x[PER];
#pragma unroll
    for (int i = 0; i < PER; i += 4) {
      uint2 v = receive(a, number, slot * IDS + tid * PER + i);
      x[i] = bf_low(v.x), x[i + 1] = bf_high(v.x), x[i + 2] = bf_low(v.y), x[i + 3] = bf_high(v.y);
    }
    if (FIRST) {
      // The stop's probability is of the logits as they are.
      float peak = x[0], sum = 0.f, stop = 0.f;
#pragma unroll
      for (int i = 1; i < PER; ++i) peak = fmaxf(peak, x[i]);
      int key = __reduce_max_sync(~0u, ordered(peak));
      Four f = shared_by_warps(s, slot, turn_, key);
      key = max(max(f.a, f.b), max(f.c, f.d));
      peak = __int_as_float(key ^ ((key >> 31) & 0x7FFFFFFF));
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        float e = __expf(x[i] - peak);
        sum += e;
        if (tid * PER + i == a.stop_id) stop = e;
      }
      f = shared_by_warps(s, slot, turn_, __float_as_int(warp_sum(sum)));
      sum = __int_as_float(f.a) + __int_as_float(f.b) + __int_as_float(f.c) + __int_as_float(f.d);
      if (a.stop_id / PER == tid && blockIdx.x == 0) a.stops[min(frame, CAPACITY - 1) * SLOTS + slot] = stop / sum;
      const u8* seen = a.seen + slot * IDS + tid * PER;
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        int id = tid * PER + i;
        if (seen[i]) x[i] = x[i] < 0 ? x[i] * penalty : x[i] / penalty;
        if (!(id < IDS - a.n_banned || (id == a.stop_id && frame >= MIN_FRAMES))) x[i] = -__int_as_float(0x7f800000);
      }
    }
    const bool greedy = temperature == 0.f;
    int n_inside = FIRST ? IDS - a.n_banned + (frame >= MIN_FRAMES && a.stop_id >= IDS - a.n_banned) : IDS;
    int k = greedy ? 1 : (int)knobs[1];
    k = k > 0 && k < n_inside ? k : n_inside;
    k = min(k, MOST_KEPT);
    int keys[PER];
    int low = 0x7FFFFFFF, high = -0x7FFFFFFF;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (!greedy) x[i] = x[i] / temperature;
      keys[i] = ordered(x[i]);
      high = max(high, keys[i]);
    }
    high = __reduce_max_sync(~0u, high);
    Four f = shared_by_warps(s, slot, turn_, high);
    high = max(max(f.a, f.b), max(f.c, f.d));
    // The k-th key: at or above ``low`` lie k keys or more, at or above ``high`` fewer. Three thresholds a round.
    const int top = high;
    low = (int)0x80800000;  // just above minus infinity
    high = top < 0x7FFFFFFF ? top + 1 : top;
    int n_low = n_inside;
    while ((u32)high - (u32)low > 1u && n_low != k) {
      u32 room = (u32)high - (u32)low, step = (room + 3u) >> 2;
      int m1 = (int)((u32)low + step), m2 = (int)((u32)low + min(room, 2 * step)), m3 = (int)((u32)low + min(room, 3 * step));
      int c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
      for (int i = 0; i < PER; ++i) c1 += keys[i] >= m1, c2 += keys[i] >= m2, c3 += keys[i] >= m3;
      // At most 1,023 keys a warp: ten bits each.
      u32 all = __reduce_add_sync(~0u, (u32)c1 | (u32)c2 << 10 | (u32)c3 << 20);
      f = shared_by_warps(s, slot, turn_, (int)all);
      c1 = (f.a & 1023) + (f.b & 1023) + (f.c & 1023) + (f.d & 1023);
      c2 = (f.a >> 10 & 1023) + (f.b >> 10 & 1023) + (f.c >> 10 & 1023) + (f.d >> 10 & 1023);
      c3 = (f.a >> 20 & 1023) + (f.b >> 20 & 1023) + (f.c >> 20 & 1023) + (f.d >> 20 & 1023);
      if (c3 >= k) low = m3, n_low = c3;
      else if (c2 >= k) high = m3, low = m2, n_low = c2;
      else if (c1 >= k) high = m2, low = m1, n_low = c1;
      else high = m1;
    }
    // Where more than k remain they are equal at the edge, ``low`` itself: the lowest ids fill the rest.
    const bool exact = n_low == k;
    int n_above = 0, n_level = 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      bool level = !exact && keys[i] == low;
      n_level += level;
      n_above += keys[i] >= low && !level;
    }
    int warp_above, warp_level;
    int above = warp_before(n_above, warp_above), level = warp_before(n_level, warp_level);
    f = shared_by_warps(s, slot, turn_, warp_above | warp_level << 16);
    Four fa{f.a & 0xffff, f.b & 0xffff, f.c & 0xffff, f.d & 0xffff}, fl{f.a >> 16, f.b >> 16, f.c >> 16, f.d >> 16};
    above = before_me(fa, warp, above), level = before_me(fl, warp, level);
    const int all_above = fa.a + fa.b + fa.c + fa.d;
    // Kept ones above the edge in the order of their ids, then those at the edge.
    float* score = s.picked[slot];
    int* ids = (int*)(score + 64);
    float* sorted = score + 128;
    int* sorted_ids = (int*)(score + 192);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      bool at_edge = !exact && keys[i] == low;
      if (keys[i] >= low && !at_edge) score[above] = x[i], ids[above++] = tid * PER + i;
      if (at_edge) {
        if (all_above + level < k) score[all_above + level] = x[i], ids[all_above + level] = tid * PER + i;
        ++level;
      }
    }
    barrier(2 + slot, 128);
    // Each kept one finds its place: how many are likelier, or as likely with a lower id.
    if (tid < k) {
      float mine = score[tid];
      int id = ids[tid], rank = 0;
      for (int j = 0; j < k; ++j) rank += score[j] > mine || (score[j] == mine && ids[j] < id);
      sorted[rank] = mine, sorted_ids[rank] = id;
    }
    barrier(2 + slot, 128);
    if (warp == 0) {
      float peak = sorted[0];
      float m0 = lane < k ? __expf(sorted[lane] - peak) : 0.f, m1 = lane + 32 < k ? __expf(sorted[lane + 32] - peak) : 0.f;
      float c0 = m0, c1 = m1;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        float y0 = __shfl_up_sync(~0u, c0, d), y1 = __shfl_up_sync(~0u, c1, d);
        if (lane >= d) c0 += y0, c1 += y1;
      }
      c1 += __shfl_sync(~0u, c0, 31);
      float total = __shfl_sync(~0u, c1, 31);
      if (top_p < 1.f) {
        float goal = top_p * total;
        // One is kept while what lies before it is below the goal.
        int kept = __popc(__ballot_sync(~0u, lane < k && c0 - m0 < goal)) + __popc(__ballot_sync(~0u, lane + 32 < k && c1 - m1 < goal));
        kept = max(kept, 1);
        total = kept > 32 ? __shfl_sync(~0u, c1, kept - 33) : __shfl_sync(~0u, c0, kept - 1);
        k = kept;
      }
      float goal = greedy ? 0.f : uniform(a.seed[slot], frame, codebook) * total;
      u32 b0 = __ballot_sync(~0u, lane < k && c0 > goal), b1 = __ballot_sync(~0u, lane + 32 < k && c1 > goal);
      int at = b0 ? __ffs(b0) - 1 : b1 ? 31 + __ffs(b1) : k - 1;
      if (lane == 0) {
        int code = sorted_ids[at];
        if (FIRST) {
          if (code == a.stop_id) s.alive[slot] = 0;
          if (!s.alive[slot]) code = 0;
        }
        s.code[slot][codebook] = code;
      }
    }
  }
  workers_meet();
  mark(a, s, 3);
}

// ---- the predictor ----

// Attention over a few positions: a warp takes a head, and every block does all of it, which is quicker than mail.
template <int N>
__device__ void attend_small(const Arguments& a, Shared& s, u32 number, int layer, int past) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr int WIDTH = (PH + 2 * PG) * HD, REPEATS = PH / PG;
  const Gains<E> gains(a.small_gains, layer);
  for (int unit = warp; unit < PH * N; unit += WARPS) {
    const int head = unit % PH, column = unit / PH, slot = column % SLOTS, own = column / SLOTS, group = head / REPEATS;
    const u64 cache = ((u64)(layer * SLOTS + slot) * PG + group) * Q * HD + 4 * lane;
    const Turn query(gains.query, a.small_cos, a.small_sin, past + own);
    const Turn key0(gains.key, a.small_cos, a.small_sin, past), key1(gains.key, a.small_cos, a.small_sin, past + own);
    float q[4], o[4] = {0.f, 0.f, 0.f, 0.f}, peak = -1e30f, weight = 0.f;
    for (int start = 0; start == 0 || start < past; start += 8) {
      uint2 key[8], value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (start + i < past) {
          key[i] = load8(a.small_keys + cache + (start + i) * HD);
          value[i] = load8(a.small_values + cache + (start + i) * HD);
        }
      if (start == 0) {
        unpack(receive(a, number, column * WIDTH + head * HD + 4 * lane), q);
        query(q, a.small_eps);
      }
      float score[8], risen = peak;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float x[4];
        unpack(start + i < past ? key[i] : make_uint2(0, 0), x);
        score[i] = start + i < past ? warp_sum(dot(q, x)) * rsqrtf((float)HD) : -1e30f;
        risen = fmaxf(risen, score[i]);
      }
      float fade = __expf(peak - risen);
      weight *= fade;
#pragma unroll
      for (int j = 0; j < 4; ++j) o[j] *= fade;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (start + i < past) {
          float part = __expf(score[i] - risen), x[4];
          unpack(value[i], x);
          weight += part;
#pragma unroll
          for (int j = 0; j < 4; ++j) o[j] += part * x[j];
        }
      peak = risen;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (i <= own) {
        const int base = (slot + i * SLOTS) * WIDTH + (PH + group) * HD + 4 * lane;
        uint2 fresh = receive(a, number, base), fresh_value = receive(a, number, base + PG * HD);
        float key[4], value[4];
        unpack(fresh, key);
        unpack(fresh_value, value);
        (i == 0 ? key0 : key1)(key, a.small_eps);
        if (i == own && blockIdx.x == 0 && head % REPEATS == 0) {
          *(uint2*)(a.small_keys + cache + (past + i) * HD) = packed(key);
          *(uint2*)(a.small_values + cache + (past + i) * HD) = fresh_value;
        }
        float one = warp_sum(dot(q, key)) * rsqrtf((float)HD);
        float risen = fmaxf(peak, one), fade = __expf(peak - risen), part = __expf(one - risen);
        weight = weight * fade + part;
#pragma unroll
        for (int j = 0; j < 4; ++j) o[j] = o[j] * fade + part * value[j];
        peak = risen;
      }
#pragma unroll
    for (int j = 0; j < 4; ++j) o[j] /= weight;
    put_summed<PREDICTOR_INT4>(s, column, head, PH * HD, lane, packed(o));
  }
  workers_meet();
  mark(a, s, 4);
}

template <int N>
__device__ void small_layers(const Arguments& a, Shared& s, u8* ring, Place& place, u32& exchange, int codebook) {
  const int past = codebook == 1 ? 0 : codebook;
  auto of_x = [&](int column, int at) { return receive(a, exchange, column * E + at); };
  auto onto_x = [&](int row, int column, float x, float y) {
    const u32 raw = *(const u32*)(s.raw + column * E + row);
    return two_bf(x + bf_low(raw), y + bf_high(raw));
  };
  for (int layer = 0; layer < PL; ++layer) {
    const Gains<E> gains(a.small_gains, layer);
    if (layer > 0)
      stage_normed<E, N, PREDICTOR_INT4, true>(a, s, gains.attention, a.small_eps, of_x);
    else
      stage_normed<E, N, PREDICTOR_INT4, true>(a, s, gains.attention, a.small_eps, [&](int column, int at) {
        if (codebook == 1 && column < SLOTS) return PROJECTED ? receive(a, exchange, column * E + at) : load8(a.hidden + column * E + at);
        return load8(a.projected[codebook - 1] + (u64)s.code[column % SLOTS][codebook - 1] * E + at);
      });
    product<SmallQkv, N>(a, place, s, ring, exchange, Rounded());
    attend_small<N>(a, s, exchange, layer, past);
    product<SmallOut, N>(a, place, s, ring, exchange, onto_x);
    stage_normed<E, N, PREDICTOR_INT4, true>(a, s, gains.mlp, a.small_eps, of_x);
    product<SmallGateUp, N>(a, place, s, ring, exchange, Rounded());
    stage<J, N, PREDICTOR_INT4>(a, s, [&](int column, int at) { return receive(a, exchange, column * J + at); });
    product<SmallDown, N>(a, place, s, ring, exchange, onto_x);
  }
  // What block 0 sends next says that its part of the cache is there.
  if (blockIdx.x == 0) asm volatile("fence.acq_rel.gpu;" ::: "memory");
  stage_normed<E, SLOTS, false, false>(a, s, Gains<E>(a.small_gains, PL).attention, a.small_eps, [&](int column, int at) {
    return receive(a, exchange, (N - SLOTS + column) * E + at);
  });
  product<Head, SLOTS>(a, place, s, ring, exchange, Rounded());
  sample<W, false>(a, s, exchange, codebook);
}

// ---- the talker ----

__device__ __forceinline__ int n_splits(int length) {
  return greater(1, lesser(MOST_SPLITS, divided(length, 64)));
}

// A block reads one share of one key head's cache; shares are joined where they are read.
__device__ void attend(const Arguments& a, Shared& s, u32& exchange, int layer) {
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  constexpr int WIDTH = (H + 2 * G) * HD;
  const Gains<D> gains(a.gains, layer);
  const u32 before = exchange, number = ++exchange;
  float* peaks = s.red;
  float* weights = peaks + WARPS * REP;
  float* sums = weights + WARPS * REP;
  float* fresh = sums + WARPS * REP * HD;  // REP queries, the new key, the new value
  for (int unit = blockIdx.x; unit < SLOTS * G * MOST_SPLITS; unit += GRID) {
    const int split = unit / (SLOTS * G), slot = unit % (SLOTS * G) / G, group = unit % G;
    const int past = min(s.prompt[slot] + s.frame[slot], CAPACITY - 1), splits = n_splits(past + 1);
    if (split >= splits) continue;
    const bool last = split == splits - 1;
    const u64 cache = ((u64)(layer * SLOTS + slot) * G + group) * CAPACITY * HD + 4 * lane;
    const int share = divided(divided(past, splits), 4) * 4, end = min(past, (split + 1) * share);
    int start = split * share + 4 * warp;
    uint2 key[4], value[4];
    auto ask = [&]() {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (start + i < end) {
          key[i] = load8(a.keys + cache + (u64)(start + i) * HD);
          value[i] = load8(a.values + cache + (u64)(start + i) * HD);
        }
    };
    ask();
    if (warp < REP + 2) {
      const Turn turn(warp < REP ? gains.query : gains.key, a.cos, a.sin, past);
      const int head = warp < REP ? group * REP + warp : H + group + (warp - REP) * G;
      float x[4];
      unpack(receive(a, before, slot * WIDTH + head * HD + 4 * lane), x);
      if (warp <= REP) turn(x, a.eps);
      if (last && warp >= REP) *(uint2*)((warp == REP ? a.keys : a.values) + cache + (u64)past * HD) = packed(x);
      *(float4*)(fresh + warp * HD + 4 * lane) = make_float4(x[0], x[1], x[2], x[3]);
    }
    workers_meet();
    float q[REP][4], o[REP][4], peak[REP], weight[REP];
#pragma unroll
    for (int r = 0; r < REP; ++r) {
      float4 v = *(const float4*)(fresh + r * HD + 4 * lane);
      q[r][0] = v.x, q[r][1] = v.y, q[r][2] = v.z, q[r][3] = v.w;
      o[r][0] = o[r][1] = o[r][2] = o[r][3] = weight[r] = 0.f;
      peak[r] = -1e30f;
    }
    while (start < end) {
#pragma unroll
      for (int r = 0; r < REP; ++r) {
        float score[4], risen = peak[r];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x[4];
          unpack(start + i < end ? key[i] : make_uint2(0, 0), x);
          score[i] = start + i < end ? warp_sum(dot(q[r], x)) * rsqrtf((float)HD) : -1e30f;
          risen = fmaxf(risen, score[i]);
        }
        float fade = __expf(peak[r] - risen);
        weight[r] *= fade;
#pragma unroll
        for (int j = 0; j < 4; ++j) o[r][j] *= fade;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (start + i < end) {
            float part = __expf(score[i] - risen), x[4];
            unpack(value[i], x);
            weight[r] += part;
#pragma unroll
            for (int j = 0; j < 4; ++j) o[r][j] += part * x[j];
          }
        peak[r] = risen;
      }
      start += 4 * WARPS;
      ask();
    }
    if (last && warp == 0) {
      float4 k4 = *(const float4*)(fresh + REP * HD + 4 * lane), v4 = *(const float4*)(fresh + (REP + 1) * HD + 4 * lane);
      float fresh_key[4] = {k4.x, k4.y, k4.z, k4.w}, fresh_value[4] = {v4.x, v4.y, v4.z, v4.w};
#pragma unroll
      for (int r = 0; r < REP; ++r) {
        float one = warp_sum(dot(q[r], fresh_key)) * rsqrtf((float)HD);
        float risen = fmaxf(peak[r], one), fade = __expf(peak[r] - risen), part = __expf(one - risen);
        weight[r] = weight[r] * fade + part;
#pragma unroll
        for (int j = 0; j < 4; ++j) o[r][j] = o[r][j] * fade + part * fresh_value[j];
        peak[r] = risen;
      }
    }
#pragma unroll
    for (int r = 0; r < REP; ++r) {
      if (lane == 0) peaks[warp * REP + r] = peak[r], weights[warp * REP + r] = weight[r];
      *(float4*)(sums + (warp * REP + r) * HD + 4 * lane) = make_float4(o[r][0], o[r][1], o[r][2], o[r][3]);
    }
    workers_meet();
    for (int out = tid; out < REP * HD / 2; out += WORKERS) {
      const int r = out / (HD / 2), dim = 2 * (out % (HD / 2)), part = (slot * H + group * REP + r) * MOST_SPLITS + split;
      float top = -1e30f, total = 0.f, x = 0.f, y = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) top = fmaxf(top, peaks[w * REP + r]);
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float fade = __expf(peaks[w * REP + r] - top);
        const float2 sum = *(const float2*)(sums + (w * REP + r) * HD + dim);
        total += fade * weights[w * REP + r], x += fade * sum.x, y += fade * sum.y;
      }
      send_floats(a.parts + (u64)part * HD + dim, number, x, y);
      if (dim == 0) send_floats(a.part_weights + (u64)part * 2, number, top, total);
    }
    workers_meet();
  }
  mark(a, s, 5);
}

// Joins the shares of all heads into s.x.
__device__ void stage_attended(const Arguments& a, Shared& s, u32 number) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int unit = warp; unit < SLOTS * H; unit += WARPS) {
    const int slot = unit / H, head = unit % H;
    const int splits = n_splits(min(s.prompt[slot] + s.frame[slot], CAPACITY - 1) + 1);
    float peak = -1e30f, weight = 0.f;
    if (lane < splits) {
      const uint2 got = receive_from(a.part_weights + (u64)(unit * MOST_SPLITS + lane) * 2, number);
      peak = __uint_as_float(got.x), weight = __uint_as_float(got.y);
    }
    __syncwarp();
    float top = peak;
#pragma unroll
    for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    float fade = __expf(peak - top), o[4] = {0.f, 0.f, 0.f, 0.f};
    fade /= warp_sum(fade * weight);
    for (int split = 0; split < splits; ++split) {
      const float by = __shfl_sync(~0u, fade, split);
      const u64* from = a.parts + (u64)(unit * MOST_SPLITS + split) * HD + 4 * lane;
      const uint2 low = receive_from(from, number), high = receive_from(from + 2, number);
      o[0] += by * __uint_as_float(low.x), o[1] += by * __uint_as_float(low.y);
      o[2] += by * __uint_as_float(high.x), o[3] += by * __uint_as_float(high.y);
    }
    put_summed<TALKER_INT4>(s, slot, head, H * HD, lane, packed(o));
  }
  workers_meet();
  mark(a, s, 1);
}

// The talker's next input: the sum of a frame's embeddings and its text, each addition rounded where the model rounds.
__device__ __forceinline__ uint2 embedded(const Arguments& a, Shared& s, int slot, int at) {
  float sum[4] = {0.f, 0.f, 0.f, 0.f}, x[4];
  uint2 four[Q];
#pragma unroll
  for (int codebook = 0; codebook < Q; ++codebook)
    four[codebook] = load8(a.tables[codebook] + (u64)s.code[slot][codebook] * D + at);
  const int line = min(s.frame[slot], a.n_text[slot] - 1);
  uint2 text = load8(a.texts + ((u64)slot * LINES + line) * D + at);
#pragma unroll
  for (int codebook = 1; codebook < Q; ++codebook) {
    unpack(four[codebook], x);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += x[j];
  }
  float t[4];
  unpack(four[0], x);
  unpack(text, t);
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] = rounded(x[j] + rounded(sum[j])) + t[j];
  return packed(sum);
}

__device__ void talker_layers(const Arguments& a, Shared& s, u8* ring, Place& place, u32& exchange) {
  auto of_x = [&](int column, int at) { return receive(a, exchange, column * D + at); };
  auto onto_x = [&](int row, int column, float x, float y) {
    const u32 raw = *(const u32*)(s.raw + column * D + row);
    return two_bf(x + bf_low(raw), y + bf_high(raw));
  };
  for (int layer = 0; layer < L; ++layer) {
    const Gains<D> gains(a.gains, layer);
    if (layer == 0)
      stage_normed<D, SLOTS, TALKER_INT4, true>(a, s, gains.attention, a.eps, [&](int column, int at) { return embedded(a, s, column, at); });
    else
      stage_normed<D, SLOTS, TALKER_INT4, true>(a, s, gains.attention, a.eps, of_x);
    product<Qkv, SLOTS>(a, place, s, ring, exchange, Rounded());
    attend(a, s, exchange, layer);
    stage_attended(a, s, exchange);
    product<Out, SLOTS>(a, place, s, ring, exchange, onto_x);
    stage_normed<D, SLOTS, TALKER_INT4, true>(a, s, gains.mlp, a.eps, of_x);
    product<GateUp, SLOTS>(a, place, s, ring, exchange, Rounded());
    stage<I, SLOTS, TALKER_INT4>(a, s, [&](int column, int at) { return receive(a, exchange, column * I + at); });
    product<Down, SLOTS>(a, place, s, ring, exchange, onto_x);
  }
}

// ---- the frame ----

__device__ void feed_all(const Arguments& a, Shared& s, u8* ring) {
  Place place;
  u64 once, again;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(again));
  const u64 small = PREDICTOR_INT4 ? again : once;
  const Weight* next = a.stream;
  feed<Head0>(*next++, place, s, ring, once);
  if (PROJECTED) feed<Projection>(*next++, place, s, ring, once);
  const Weight* layers = next;
  const Weight* heads = layers + 4 * PL;
  for (int codebook = 1; codebook < Q; ++codebook) {
    for (int layer = 0; layer < PL; ++layer) {
      feed<SmallQkv>(layers[4 * layer], place, s, ring, small);
      feed<SmallOut>(layers[4 * layer + 1], place, s, ring, small);
      feed<SmallGateUp>(layers[4 * layer + 2], place, s, ring, small);
      feed<SmallDown>(layers[4 * layer + 3], place, s, ring, small);
    }
    feed<Head>(heads[codebook - 1], place, s, ring, once);
  }
  next = heads + Q - 1;
  for (int layer = 0; layer < L; ++layer) {
    feed<Qkv>(*next++, place, s, ring, once);
    feed<Out>(*next++, place, s, ring, once);
    feed<GateUp>(*next++, place, s, ring, once);
    feed<Down>(*next++, place, s, ring, once);
  }
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1) frame(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) u8 memory[];
  u8* ring = memory;
  Shared& s = *(Shared*)(memory + (u64)RING * RING_SLOT);
  const int tid = threadIdx.x, warp = tid >> 5;
  if (tid == 0) {
    for (int i = 0; i < RING; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&s.full[i])) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&s.empty[i])), "n"(WARPS) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (tid < SLOTS) s.frame[tid] = a.frame[tid], s.alive[tid] = a.alive[tid], s.prompt[tid] = a.prompt[tid];
  __syncthreads();
  if (warp == WARPS) {
    feed_all(a, s, ring);
    return;
  }
  Place place;
  u32 exchange = *a.exchange;
  if (tid == 0) s.n_marks = 0, s.ring_waits = 0;
  mark(a, s, 0);
  stage<D, SLOTS, false>(a, s, [&](int column, int at) { return load8(a.hidden + column * D + at); });
  product<Head0, SLOTS>(a, place, s, ring, exchange, Rounded());
  const u32 logits = exchange;
  if (PROJECTED) {
    workers_meet();
    product<Projection, SLOTS>(a, place, s, ring, exchange, [&](int row, int, float x, float y) {
      return two_bf(x + bf(a.projection_bias[row]), y + bf(a.projection_bias[row + 1]));
    });
  }
  sample<V, true>(a, s, logits, 0);
  small_layers<COLS>(a, s, ring, place, exchange, 1);
  for (int codebook = 2; codebook < Q; ++codebook) small_layers<SLOTS>(a, s, ring, place, exchange, codebook);
  talker_layers(a, s, ring, place, exchange);
  if (blockIdx.x != 0) return;
  stage_normed<D, SLOTS, false, false>(a, s, Gains<D>(a.gains, L).attention, a.eps, [&](int column, int at) { return receive(a, exchange, column * D + at); });
  for (int i = tid; i < SLOTS * D / 8; i += WORKERS) ((uint4*)a.hidden)[i] = ((const uint4*)s.x)[i];
  if (tid == 0) *a.exchange = exchange;
  if (tid < SLOTS * Q) {
    const int slot = tid / Q, codebook = tid % Q;
    a.codes[(min(s.frame[slot], CAPACITY - 1) * SLOTS + slot) * Q + codebook] = s.alive[slot] ? s.code[slot][codebook] : ENDED;
  }
  if (tid < SLOTS) {
    // What was drawn counts as said, and a slot that stopped said the stop.
    a.seen[tid * V + (s.alive[tid] || !a.alive[tid] ? s.code[tid][0] : a.stop_id)] = 1;
    a.alive[tid] = s.alive[tid];
    a.past[tid] = min(s.prompt[tid] + s.frame[tid], CAPACITY - 1);
    a.frame[tid] = s.frame[tid] + (s.alive[tid] ? 1 : 0);
  }
}
