// Launches of detection_topk_cuda.h on a stream; torch is not included.
#include "detection_topk_cuda.h"
#include "launch.h"

namespace cdetr::cuda {
namespace {

static_assert(kMostKept == kMostKeptByOneLaunch, "launch.h repeats it for other compilers");

constexpr int64_t kMostImages = 65535;  // of a grid

const char* message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls launch(F{}, plan, sizes, images) for as many images at a time as a launch can take.
template <class Launch>
const char* for_images(const Detections& d, Number logits_type, bool sizes_on_host, Plan plan,
                       Launch launch) {
  plan.host_sizes = sizes_on_host && d.sizes != nullptr;
  const int64_t most = plan.host_sizes ? kHostSizes : kMostImages;
  for (int64_t first = 0; first < d.batch; first += most) {
    const int64_t images = d.batch - first < most ? d.batch - first : most;
    plan.first_image = first;
    HostSizes sizes{};
    for (int64_t i = 0; plan.host_sizes && i < images; ++i) {
      for (int side = 0; side < 2; ++side) {
        sizes.height_width[i][side] = load_number(
            d.sizes, d.sizes_type, (first + i) * d.sizes_strides[0] + side * d.sizes_strides[1]);
      }
    }
    switch (logits_type) {
      case Number::kFloat16:
        launch(Float16{}, plan, sizes, images);
        break;
      case Number::kBFloat16:
        launch(BFloat16{}, plan, sizes, images);
        break;
      case Number::kFloat32:
        launch(Float32{}, plan, sizes, images);
        break;
      default:
        return "logits: expected float16, bfloat16 or float32";
    }
    if (const char* error = message(cudaGetLastError())) return error;
  }
  return nullptr;
}

unsigned blocks_for(int64_t elements) {
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1024 ? blocks : 1024);
}

}  // namespace

Workspace workspace_of(const Detections& d) {
  const Plan plan = plan_of(d);
  if (plan.tiles == 1) return {0, 0};
  return {d.batch * plan.tiles * d.kept, d.batch};
}

const char* detection_topk(const Detections& d, Number logits_type, bool sizes_on_host,
                           int64_t* codes, int32_t* tickets, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  Plan plan = plan_of(d);
  plan.codes = reinterpret_cast<uint64_t*>(codes);
  plan.tickets = reinterpret_cast<uint32_t*>(tickets);
  if (plan.tiles > 1) {
    const cudaError_t error = cudaMemsetAsync(tickets, 0, d.batch * sizeof(uint32_t), s);
    if (error != cudaSuccess) return message(error);
  }
  return for_images(d, logits_type, sizes_on_host, plan,
                    [&](auto f, const Plan& p, const HostSizes& sizes, int64_t images) {
                      const dim3 grid(p.tiles, static_cast<unsigned>(images));
                      topk_kernel<decltype(f), kThreads><<<grid, kThreads, 0, s>>>(d, p, sizes);
                    });
}

const char* encode(const Detections& d, Number logits_type, int64_t* codes, void* stream) {
  Plan plan = plan_of(d);
  plan.codes = reinterpret_cast<uint64_t*>(codes);
  return for_images(d, logits_type, false, plan,
                    [&](auto f, const Plan& p, const HostSizes&, int64_t images) {
                      const dim3 grid(blocks_for(d.candidates()), static_cast<unsigned>(images));
                      encode_kernel<decltype(f), kThreads>
                          <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(d, p);
                    });
}

const char* write_sorted(const Detections& d, Number logits_type, bool sizes_on_host,
                         const int64_t* codes, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemsetAsync(d.counts, 0, d.batch * sizeof(int64_t), s);
  if (error != cudaSuccess) return message(error);
  Plan plan = plan_of(d);
  plan.codes = reinterpret_cast<uint64_t*>(const_cast<int64_t*>(codes));
  return for_images(d, logits_type, sizes_on_host, plan,
                    [&](auto f, const Plan& p, const HostSizes& sizes, int64_t images) {
                      const dim3 grid(blocks_for(d.kept), static_cast<unsigned>(images));
                      write_kernel<decltype(f), kThreads><<<grid, kThreads, 0, s>>>(d, p, sizes);
                    });
}

}  // namespace cdetr::cuda
