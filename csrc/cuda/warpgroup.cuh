// Products of a warpgroup (four warps, sm_90a): wgmma reads its operands from shared memory, or the
// left one from registers, while the warps go on. tests/simt/warpgroup.h has the bodies on the
// host.
//
// Operands lie in panels of 64 columns of 16 bit: rows of 128 bytes whose 16-byte chunks are
// permuted by the row's number (the hardware's 128-byte swizzle). "Along" means that the columns of
// a panel are the product's inner dimension; "across", that the rows are.
#pragma once
#include "cuda/ptx.cuh"

#if defined(GENFAST_SIMT)
#include "simt/warpgroup.h"
#else

namespace genfast::cuda {

// Code for other architectures has these kernels without a body; a call never chooses them there.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroups = false;
#else
constexpr bool kWarpgroups = true;
#endif

// A place in panels; `+` moves by bytes, a multiple of 16.
struct Operand {
  uint64_t bits;

  // height: rows of a panel.
  __device__ __forceinline__ Operand(const void* at, int height)
      : bits(uint64_t{shared_address(at) >> 4 & 0x3FFF} | uint64_t(height * 128 >> 4) << 16 |
             uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62) {}
  __device__ __forceinline__ explicit Operand(uint64_t b) : bits(b) {}
  __device__ __forceinline__ Operand operator+(int bytes) const {
    return Operand(bits + static_cast<uint64_t>(bytes >> 4));
  }
};

// Between writing registers or (through `share`) shared memory and the products that read them.
__device__ __forceinline__ void warpgroup_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kKeep>  // waits until at most kKeep groups of products are under way
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kKeep) : "memory");
}
// What this thread wrote to shared memory becomes visible to products, after the next barrier.
__device__ __forceinline__ void share() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// A word of shared memory that threads wait at (an mbarrier). A phase ends with the last of `count`
// arrivals; phases are told apart by their parity, the first has 0.
struct Signal {
  uint64_t bits;

  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                     shared_address(this))
                 : "memory");
  }
  // Arrives when every copy that this thread has asked for so far is here.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(this))
                 : "memory");
  }
  // Until a phase of this parity has ended. By whole warps. What copies brought before it may be
  // read by products.
  __device__ __forceinline__ void wait(int parity) {
    uint32_t done = 0;
    while (done == 0)
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    share();
    __syncwarp();
  }
};

// Registers of a thread from here on, by whole warpgroups: fewer, or as many as others gave back.
template <int kCount>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Keeps the compiler from moving uses of a product's sums before the wait.
template <int kN>
__device__ __forceinline__ void hold(float (&c)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
    asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

// Four sums to global memory, without an answer.
__device__ __forceinline__ void add_to(float* p, const float (&v)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v[0]),
               "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
#endif
}

#define GENFAST_SUMS_8(n)                                                        \
  "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3]), "+f"(c[n + 1][0]), \
      "+f"(c[n + 1][1]), "+f"(c[n + 1][2]), "+f"(c[n + 1][3])
#define GENFAST_SUMS_32 GENFAST_SUMS_8(0), GENFAST_SUMS_8(2), GENFAST_SUMS_8(4), GENFAST_SUMS_8(6)
#define GENFAST_SUMS_64 \
  GENFAST_SUMS_32, GENFAST_SUMS_8(8), GENFAST_SUMS_8(10), GENFAST_SUMS_8(12), GENFAST_SUMS_8(14)
#define GENFAST_NAMES_32                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GENFAST_NAMES_64                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GENFAST_PRODUCT(columns, type, names, left, rest, add)                                  \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
  "k16.f32." type "." type " {" names "}, " left ", " rest ";\n}"

// c (64 x 8 kN, in the layout of mma.m16n8k16 with 16 rows a warp) = a (64 x 16) b (16 x 8 kN), and
// plus c when `add`. Both from shared memory.
template <bool kBf16, bool kAcrossA, bool kAcrossB, int kN>
__device__ __forceinline__ void product(float (*c)[4], Operand a, Operand b, bool add) {
  static_assert(kN == 8 || kN == 16, "64 or 128 columns");
#define GENFAST_INPUTS \
  "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(add)), "n"(int{kAcrossA}), "n"(int{kAcrossB})
  if constexpr (kN == 8 && kBf16)
    asm volatile(
        GENFAST_PRODUCT("64", "bf16", GENFAST_NAMES_32, "%32", "%33, add, 1, 1, %35, %36", "%34")
        : GENFAST_SUMS_32
        : GENFAST_INPUTS);
  else if constexpr (kN == 8)
    asm volatile(
        GENFAST_PRODUCT("64", "f16", GENFAST_NAMES_32, "%32", "%33, add, 1, 1, %35, %36", "%34")
        : GENFAST_SUMS_32
        : GENFAST_INPUTS);
  else if constexpr (kBf16)
    asm volatile(
        GENFAST_PRODUCT("128", "bf16", GENFAST_NAMES_64, "%64", "%65, add, 1, 1, %67, %68", "%66")
        : GENFAST_SUMS_64
        : GENFAST_INPUTS);
  else
    asm volatile(
        GENFAST_PRODUCT("128", "f16", GENFAST_NAMES_64, "%64", "%65, add, 1, 1, %67, %68", "%66")
        : GENFAST_SUMS_64
        : GENFAST_INPUTS);
#undef GENFAST_INPUTS
}

// The same with the left operand's fragments in registers.
template <bool kBf16, bool kAcrossB, int kN>
__device__ __forceinline__ void product(float (*c)[4], const uint32_t (&a)[4], Operand b,
                                        bool add) {
  static_assert(kN == 8 || kN == 16, "64 or 128 columns");
#define GENFAST_INPUTS                                                                 \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(static_cast<int>(add)), \
      "n"(int{kAcrossB})
  if constexpr (kN == 8 && kBf16)
    asm volatile(GENFAST_PRODUCT("64", "bf16", GENFAST_NAMES_32, "{%32, %33, %34, %35}",
                                 "%36, add, 1, 1, %38", "%37")
                 : GENFAST_SUMS_32
                 : GENFAST_INPUTS);
  else if constexpr (kN == 8)
    asm volatile(GENFAST_PRODUCT("64", "f16", GENFAST_NAMES_32, "{%32, %33, %34, %35}",
                                 "%36, add, 1, 1, %38", "%37")
                 : GENFAST_SUMS_32
                 : GENFAST_INPUTS);
  else if constexpr (kBf16)
    asm volatile(GENFAST_PRODUCT("128", "bf16", GENFAST_NAMES_64, "{%64, %65, %66, %67}",
                                 "%68, add, 1, 1, %70", "%69")
                 : GENFAST_SUMS_64
                 : GENFAST_INPUTS);
  else
    asm volatile(GENFAST_PRODUCT("128", "f16", GENFAST_NAMES_64, "{%64, %65, %66, %67}",
                                 "%68, add, 1, 1, %70", "%69")
                 : GENFAST_SUMS_64
                 : GENFAST_INPUTS);
#undef GENFAST_INPUTS
}

#undef GENFAST_PRODUCT
#undef GENFAST_NAMES_64
#undef GENFAST_NAMES_32
#undef GENFAST_SUMS_64
#undef GENFAST_SUMS_32
#undef GENFAST_SUMS_8

}  // namespace genfast::cuda
#endif
