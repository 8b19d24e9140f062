// Shared by all CUDA C++ kernels (cuda_source.py puts it in front of each): short type names, and PTX's mbarriers,
// which count arrivals and bytes in shared memory.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain%=:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again%=;\n}" ::
            "r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
