// A GPU for frame.cu on a CPU, with which its logic is tested: every thread is a coroutine, all take turns.
//
// Threads of a warp that exchange numbers wait for each other, as do those at a barrier; copies arrive at once. It finds
// wrong indices, waits that never end and what is read before it is written by chance; it does not find what only a GPU's
// memory does. Everything is as slow as it sounds: for toys.

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

#define __device__
#define __forceinline__ inline
#define __noinline__
#define __global__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- threads ----

constexpr int SHARED = 232448, STACK = 1 << 16;

struct Sync { u64 arrived = 0; };
struct Warp {
  Sync all;
  u32 values[2][32];
  u32 fragments[2][32][6];
};
struct Block {
  u8* shared;
  Sync barriers[16];
  Warp warps[THREADS / 32];
};
struct Thread {
  ucontext_t context;
  int block, index;
  bool done;
  u64 met_all, met_barrier[16];
};

static Block blocks[GRID];
static Thread* threads;
static Thread* current;
static ucontext_t scheduler;
static u64 n_passed;  // how often someone got on: where nobody does, all wait forever
static int trapped;  // the line of cuda.h that found something wrong

struct Index { struct { operator int() const { return current->index; } } x; };
struct Which { struct { operator int() const { return current->block; } } x; };
static Index threadIdx;
static Which blockIdx;
#define memory (blocks[current->block].shared)

inline void give_way() { swapcontext(&current->context, &scheduler); }
inline void trap() {
  trapped = __LINE__;
  give_way();
}
inline void meet(Sync& sync, u64& met, int n) {
  const u64 goal = ++met * n;
  ++sync.arrived, ++n_passed;
  while (sync.arrived < goal) give_way();
}
inline int thread() { return current->index; }
inline void count(u32* shared) { ++*shared; }
inline Warp& warp_of() { return blocks[current->block].warps[current->index / 32]; }
inline void barrier(int id, int n) { meet(blocks[current->block].barriers[id], current->met_barrier[id], n); }
inline void __syncthreads() { barrier(0, THREADS); }
inline void meet_warp() { meet(warp_of().all, current->met_all, 32); }
inline void __syncwarp() { meet_warp(); }
// Everyone's value is there once all have met; the next exchange but one overwrites it.
inline u32* exchange_values(u32 mask, u32 mine) {
  if (mask != ~0u) trapped = __LINE__;
  u32* values = warp_of().values[current->met_all + 1 & 1];
  values[current->index % 32] = mine;
  meet_warp();
  return values;
}
template <class T> inline T shuffled(u32 mask, T x, int from) {
  u32 bits;
  memcpy(&bits, &x, 4);
  bits = exchange_values(mask, bits)[from & 31];
  memcpy(&x, &bits, 4);
  return x;
}
template <class T> inline T __shfl_xor_sync(u32 mask, T x, int d) { return shuffled(mask, x, current->index % 32 ^ d); }
template <class T> inline T __shfl_sync(u32 mask, T x, int from) { return shuffled(mask, x, from); }
template <class T> inline T __shfl_up_sync(u32 mask, T x, int d) {
  const int lane = current->index % 32;
  return shuffled(mask, x, lane < d ? lane : lane - d);
}
inline u32 __ballot_sync(u32 mask, bool x) {
  const u32* values = exchange_values(mask, x);
  u32 all = 0;
  for (int i = 0; i < 32; ++i) all |= values[i] << i;
  return all;
}
inline int __reduce_max_sync(u32 mask, int x) {
  const u32* values = exchange_values(mask, (u32)x);
  for (int i = 0; i < 32; ++i) x = (int)values[i] > x ? (int)values[i] : x;
  return x;
}
inline u32 __reduce_add_sync(u32 mask, u32 x) {
  const u32* values = exchange_values(mask, x);
  u32 all = 0;
  for (int i = 0; i < 32; ++i) all += values[i];
  return all;
}

// ---- numbers ----

inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float((u32)x); }
inline u32 __byte_perm(u32 x, u32 y, u32 which) {
  const u64 all = (u64)y << 32 | x;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) r |= (u32)(all >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return r;
}
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs((int)x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long long clock64() { return 0; }
inline u64 nanoseconds() { return 0; }
inline u32 one_bf(float x) {
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 two_bf(float low, float high) { return one_bf(low) | one_bf(high) << 16; }
inline float half(u16 x) { _Float16 y; memcpy(&y, &x, 2); return y; }
// Everyone's fragments, once all have met.
typedef u32 Fragments[32][6];
inline Fragments& exchange_fragments(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  Fragments& all = warp_of().fragments[current->met_all + 1 & 1];
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(all[current->index % 32], mine, sizeof mine);
  meet_warp();
  return all;
}
inline void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = current->index % 32, g = lane / 4, t = lane % 4;
  const auto& all = exchange_fragments(a0, a1, a2, a3, b0, b1);
  for (int out = 0; out < 4; ++out) {
    const int row = out / 2, column = 2 * t + out % 2;
    for (int k = 0; k < 16; ++k) {
      const u32 x = all[4 * g + k % 8 / 2][row + k / 8 * 2], y = all[4 * column + k % 8 / 2][4 + k / 8];
      c[out] += __uint_as_float(k & 1 ? x & 0xffff0000u : x << 16) * __uint_as_float(k & 1 ? y & 0xffff0000u : y << 16);
    }
  }
}
inline void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = current->index % 32, g = lane / 4, t = lane % 4;
  const auto& all = exchange_fragments(a0, a1, a2, a3, b0, b1);
  for (int out = 0; out < 4; ++out) {
    const int row = out / 2, column = 2 * t + out % 2;
    for (int k = 0; k < 32; ++k) {
      const u32 x = all[4 * g + k % 16 / 4][row + k / 16 * 2], y = all[4 * column + k % 16 / 4][4 + k / 16];
      c[out] += (int)(x >> k % 4 * 8 & 0xff) * (signed char)(y >> k % 4 * 8);
    }
  }
}

// ---- memory ----

inline uint2 load8(const void* p) {
  if ((u64)p % 8) trapped = __LINE__;
  uint2 r;
  memcpy(&r, p, 8);
  return r;
}
inline uint4 load16(const u64* p) {
  if ((u64)p % 16) trapped = __LINE__;
  give_way();
  uint4 r;
  memcpy(&r, p, 16);
  return r;
}
inline void store(u64* p, uint2 x) { memcpy(p, &x, 8), ++n_passed; }
inline void store(u64* p, uint4 x) { memcpy(p, &x, 16), ++n_passed; }

// ---- gates: how many must arrive, how many have, the phase, the bytes that are missing ----

struct Gate { u16 n, arrived; short phase, waiting; };
static_assert(sizeof(Gate) == 8, "a gate is as large as on a GPU");
struct Bytes { Gate* gate; int missing; };
inline void move_on(Gate* gate) {
  if (gate->arrived == gate->n) gate->arrived = 0, gate->phase ^= 1, ++n_passed;
}
inline void set_up(u64* gate, u32 n) { *(Gate*)gate = Gate{(u16)n, 0, 0, 0}; }
inline void all_set_up() {}
inline bool passed(u64* gate, u32 parity) {
  if (((Gate*)gate)->phase != (short)parity) return true;
  give_way();
  return false;
}
inline void arrive(u64* gate) {
  ++((Gate*)gate)->arrived;
  move_on((Gate*)gate);
}
// The bytes are counted in units of sixteen, all that is copied at a time.
inline void expect(u64* gate, u32 n_bytes) {
  if (n_bytes % 16) trapped = __LINE__;
  ((Gate*)gate)->waiting = (short)(n_bytes / 16);
}
inline void fetch(void* to, const void* from, u32 n_bytes, u64* gate, u64) {
  if ((u64)to % 16 || (u64)from % 16 || n_bytes % 16 || n_bytes == 0) trapped = __LINE__;
  memcpy(to, from, n_bytes);
  Gate* g = (Gate*)gate;
  g->waiting -= (short)(n_bytes / 16);
  if (g->waiting == 0) ++g->arrived, move_on(g);
}
inline u64 leaves_first() { return 0; }
inline u64 leaves_last() { return 0; }

// ---- running ----

template <class Kernel> int run(Kernel kernel) {
  static Kernel* given_kernel;
  given_kernel = &kernel;
  trapped = 0;
  for (auto& block : blocks) {
    block = Block{};
    block.shared = (u8*)aligned_alloc(128, SHARED);
    memset(block.shared, 0xff, SHARED);
  }
  threads = (Thread*)calloc(GRID * THREADS, sizeof(Thread));
  u8* stacks = (u8*)malloc((u64)GRID * THREADS * STACK);
  for (int i = 0; i < GRID * THREADS; ++i) {
    Thread& thread = threads[i];
    thread.block = i / THREADS, thread.index = i % THREADS;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks + (u64)i * STACK, thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, (void (*)())+[]() {
      (*given_kernel)();
      current->done = true;
      ++n_passed;
    }, 0);
  }
  int left = GRID * THREADS, idle = 0;
  while (left && !trapped && idle < 100) {
    const u64 before = n_passed;
    left = 0;
    for (int warp = 0; warp < GRID * THREADS / 32 && !trapped; ++warp) {
      // A warp goes on as long as it gets anywhere.
      for (u64 start = n_passed - 1; start != n_passed && !trapped;) {
        start = n_passed;
        for (int i = 0; i < 32 && !trapped; ++i) {
          current = threads + warp * 32 + i;
          if (!current->done) swapcontext(&scheduler, &current->context);
        }
      }
      for (int i = 0; i < 32; ++i) left += !threads[warp * 32 + i].done;
    }
    idle = n_passed == before ? idle + 1 : 0;
  }
  for (auto& block : blocks) free(block.shared);
  free(stacks), free(threads);
  return trapped ? trapped : left ? -1 : 0;
}
