// RAFT's select_k behind a C function, for benchmarks/kernel_airtopk.py: the k largest of every row of a matrix.
// RAFT (Apache-2.0) is included from its headers when this is built (build.sh).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <raft/core/resources.hpp>
#include <raft/core/resource/cuda_stream.hpp>
#include <raft/core/resource/device_memory_resource.hpp>
#include <raft/matrix/detail/select_k-inl.cuh>
#include <rmm/mr/cuda_async_memory_resource.hpp>
#include <stdexcept>
#include <string>

namespace {

thread_local std::string last_error;

// Scratch comes from a pool: cudaMalloc in every call would be timed with the selection.
struct Resources : raft::resources {
  Resources() {
    raft::resource::set_workspace_resource(*this, std::make_shared<rmm::mr::cuda_async_memory_resource>());
  }
};

// Lives as long as the process, since CUDA may be gone when destructors run.
raft::resources& resources() {
  static auto* const only = new Resources;
  return *only;
}

template <typename T>
void select(const void* values, int64_t rows, int64_t columns, int k, void* best, int32_t* index, int algorithm) {
  raft::matrix::detail::select_k<T, int32_t>(
      resources(), static_cast<const T*>(values), nullptr, rows, columns, k, static_cast<T*>(best), index,
      /*select_min=*/false, /*sorted=*/false, static_cast<raft::matrix::SelectAlgo>(algorithm));
}

}  // namespace

extern "C" {

// values [rows, columns] and best [rows, k] of one dtype: 0 float32, 1 float16, 2 bfloat16; index [rows, k] int32.
// algorithm: a raft::matrix::SelectAlgo.  Not sorted by the radix algorithms.  Returns 0, or 1: see airtopk_error.
int airtopk_select(const void* values, int dtype, int64_t rows, int64_t columns, int k, void* best, int32_t* index,
                   int algorithm, void* stream) {
  try {
    raft::resource::set_cuda_stream(resources(), static_cast<cudaStream_t>(stream));
    switch (dtype) {
      case 0: select<float>(values, rows, columns, k, best, index, algorithm); break;
      case 1: select<__half>(values, rows, columns, k, best, index, algorithm); break;
      case 2: select<__nv_bfloat16>(values, rows, columns, k, best, index, algorithm); break;
      default: throw std::invalid_argument("dtype " + std::to_string(dtype) + " is none of 0, 1, 2");
    }
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

const char* airtopk_error() { return last_error.c_str(); }
}
