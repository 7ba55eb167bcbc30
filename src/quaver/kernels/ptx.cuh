// What frame.cu needs of the machine: one small function an instruction. tests/gpu/cuda.h has them for a CPU.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

extern __shared__ __align__(128) u8 memory[];

__device__ __forceinline__ void trap() { asm volatile("trap;"); }
// A thread's number as something that the compiler keeps.
__device__ __forceinline__ int thread() {
  int r;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void count(u32* shared) { atomicAdd(shared, 1u); }
__device__ __forceinline__ void barrier(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
__device__ __forceinline__ u64 nanoseconds() {
  u64 r;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(r) :: "memory");
  return r;
}

// ---- numbers ----

__device__ __forceinline__ u32 two_bf(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float half(u16 x) {
  float r;
  asm("{.reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "h"(x));
  return r;
}
// c [16, 8] += a [16, 16] b [16, 8]: bfloat16 in, float32 out, fragments as PTX lays them out.
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// c [16, 8] += a [16, 32] b [32, 8]: unsigned and signed bytes in, whole numbers out.
__device__ __forceinline__ void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- global memory that other blocks write while the kernel runs ----

// Not from the first-level cache.
__device__ __forceinline__ uint2 load8(const void* p) {
  uint2 r;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p) : "memory");
  return r;
}
// Each half of eight bytes is as some block wrote it.
__device__ __forceinline__ uint4 load16(const u64* p) {
  uint4 r;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ void store(u64* p, uint2 x) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store(u64* p, uint4 x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// ---- copies to shared memory, and the gates that say when they are there ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void set_up(u64* gate, u32 n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(gate)), "r"(n) : "memory");
}
__device__ __forceinline__ void all_set_up() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ bool passed(u64* gate, u32 parity) {
  u32 r;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(r) : "r"(shared_address(gate)), "r"(parity) : "memory");
  return r;
}
__device__ __forceinline__ void arrive(u64* gate) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}" ::"r"(shared_address(gate)) : "memory");
}
// Arrives, and says that ``n_bytes`` more must come before the gate opens.
__device__ __forceinline__ void expect(u64* gate, u32 n_bytes) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}"
               ::"r"(shared_address(gate)), "r"(n_bytes) : "memory");
}
__device__ __forceinline__ void fetch(void* to, const void* from, u32 n_bytes, u64* gate, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(shared_address(to)), "l"(from), "r"(n_bytes), "r"(shared_address(gate)), "l"(policy) : "memory");
}
__device__ __forceinline__ u64 leaves_first() {
  u64 r;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(r));
  return r;
}
__device__ __forceinline__ u64 leaves_last() {
  u64 r;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(r));
  return r;
}
