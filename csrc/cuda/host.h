// Launch helpers shared by the .cu files. Host only.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace qk::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // a refused launch must not surface again in somebody else's check
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Raises a kernel's dynamic shared memory limit, once per kernel and device. `done` is a bit per device.
inline void allow_shared_memory(const void* kernel, size_t bytes, std::atomic<uint64_t>& done) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  done.fetch_or(bit, std::memory_order_relaxed);
}

// The dynamic shared memory a block may ask of the current device, in bytes.
inline int shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  int cluster_x = 1, cluster_y = 1;  // CTAs of a cluster
  bool dependent = false;  // programmatic dependent launch
};

// What this process launched last, on whatever stream: launch()'s `name`. For choices that no result depends on.
inline std::atomic<const char*> last_launch{nullptr};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream, const char* name,
            const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.cluster_x * shape.cluster_y > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.cluster_x);
    attributes[count].val.clusterDim.y = static_cast<unsigned>(shape.cluster_y);
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
  last_launch.store(name, std::memory_order_relaxed);
}

inline unsigned blocks(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

}  // namespace qk::cuda
