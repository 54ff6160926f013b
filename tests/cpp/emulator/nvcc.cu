// All of the emulator's test kernels for nvcc: the wrappers' other side has to compile too.
#if TEST_ARCHITECTURE >= 80
#include "gemm.cuh"
#include "planted_bugs.cuh"
#endif
#include "collectives.cuh"

namespace inception_ext::kernels {

#if TEST_ARCHITECTURE >= 80
template cudaError_t gemm<__half>(const GemmParams<__half>&, cudaStream_t);
template cudaError_t gemm<__nv_bfloat16>(const GemmParams<__nv_bfloat16>&, cudaStream_t);
template __global__ void multiply_tile<Tile::kTransposedB>(const __half*, const __half*, float*);
template __global__ void multiply_tile<Tile::kTf32>(const float*, const float*, float*);
template __global__ void missing_copy_wait<false>(const float*, float*);
template __global__ void barrier_for_too_many<false>(const float*, float*);
#endif
template __global__ void multiply_tile<Tile::kNarrow>(const __half*, const __half*, float*);

}  // namespace inception_ext::kernels
