// Runs detection_topk's device code on the cases that come on standard input; results go to
// standard output. All memory is of the exact size, and what is not written keeps a poison.
#include "detection_topk_cuda.h"

namespace {

using namespace cdetr;

struct Header {
  int32_t logits_type, boxes_type, batch, queries, classes, kept, sizes, tile, threads;
  int32_t unused;
  double threshold;
};
enum Sizes { kNone, kOnHost, kOnDevice };

size_t bytes(int32_t type) {
  switch (static_cast<Number>(type)) {
    case Number::kFloat64:
      return 8;
    case Number::kFloat32:
      return 4;
    default:
      return 2;
  }
}

std::unique_ptr<char[]> read(size_t size) {
  std::unique_ptr<char[]> data(new char[size]);
  if (std::fread(data.get(), 1, size, stdin) != size) emulated::fail("a case is cut short");
  return data;
}

std::unique_ptr<char[]> poisoned(size_t size) {
  std::unique_ptr<char[]> data(new char[size]);
  std::memset(data.get(), 0xff, size);
  return data;
}

template <class F, int kBlock>
void run(const Detections& d, const Header& header, const double* host_sizes) {
  cuda::Plan plan = cuda::plan_of(d);
  if (header.tile > 0) {
    plan.tile = header.tile;
    plan.tiles = static_cast<int32_t>((d.candidates() + header.tile - 1) / header.tile);
  }
  cuda::HostSizes sizes{};
  plan.host_sizes = header.sizes == kOnHost;
  if (plan.host_sizes) std::memcpy(&sizes, host_sizes, d.batch * 2 * sizeof(double));
  const auto batch = static_cast<unsigned>(d.batch);
  if (d.kept <= cuda::kMostKept) {
    std::vector<uint64_t> codes(d.batch * plan.tiles * d.kept, ~uint64_t{0});
    std::vector<uint32_t> tickets(d.batch);
    plan.codes = codes.data();
    plan.tickets = tickets.data();
    emulated::launch(plan.tiles, batch, kBlock,
                     [&] { cuda::topk_kernel<F, kBlock>(d, plan, sizes); });
    return;
  }
  std::vector<uint64_t> codes(d.batch * d.candidates());
  plan.codes = codes.data();
  emulated::launch(3, batch, kBlock, [&] { cuda::encode_kernel<F, kBlock>(d, plan); });
  std::vector<uint64_t> sorted;
  for (int64_t image = 0; image < d.batch; ++image) {
    const auto first = codes.begin() + image * d.candidates();
    std::sort(first, first + d.candidates(), std::greater<uint64_t>());
    sorted.insert(sorted.end(), first, first + d.kept);
  }
  plan.codes = sorted.data();
  std::memset(d.counts, 0, d.batch * sizeof(int64_t));
  emulated::launch(2, batch, kBlock, [&] { cuda::write_kernel<F, kBlock>(d, plan, sizes); });
}

template <class F>
void run(const Detections& d, const Header& header, const double* host_sizes) {
  if (header.threads == 64) {
    run<F, 64>(d, header, host_sizes);
  } else {
    run<F, cuda::kThreads>(d, header, host_sizes);
  }
}

}  // namespace

int main() {
  Header header;
  while (std::fread(&header, sizeof(header), 1, stdin) == 1) {
    const int64_t batch = header.batch, queries = header.queries, classes = header.classes;
    const int64_t rows = batch * header.kept;
    const auto logits = read(batch * queries * classes * bytes(header.logits_type));
    const auto boxes = read(batch * queries * 4 * bytes(header.boxes_type));
    const auto sizes = read(batch * 2 * sizeof(double));
    const size_t real = header.boxes_type == static_cast<int32_t>(Number::kFloat64) ? 8 : 4;
    const auto scores = poisoned(rows * real), labels = poisoned(rows * 8),
               boxes_xyxy = poisoned(rows * 4 * real), query_index = poisoned(rows * 8),
               counts = poisoned(batch * 8);

    Detections d{};
    d.logits = logits.get();
    d.logits_batch_stride = queries * classes;
    d.boxes = boxes.get();
    d.boxes_type = static_cast<Number>(header.boxes_type);
    d.boxes_strides[0] = queries * 4;
    d.boxes_strides[1] = 4;
    d.boxes_strides[2] = 1;
    d.sizes = header.sizes == kOnDevice ? sizes.get() : nullptr;
    d.sizes_type = Number::kFloat64;
    d.sizes_strides[0] = 2;
    d.sizes_strides[1] = 1;
    d.batch = batch;
    d.queries = header.queries;
    d.classes = header.classes;
    d.kept = header.kept;
    d.threshold = header.threshold;
    d.is_double = real == 8;
    d.scores = scores.get();
    d.labels = reinterpret_cast<int64_t*>(labels.get());
    d.boxes_xyxy = boxes_xyxy.get();
    d.query_index = reinterpret_cast<int64_t*>(query_index.get());
    d.counts = reinterpret_cast<int64_t*>(counts.get());

    const auto* host_sizes = reinterpret_cast<const double*>(sizes.get());
    switch (static_cast<Number>(header.logits_type)) {
      case Number::kFloat16:
        run<Float16>(d, header, host_sizes);
        break;
      case Number::kBFloat16:
        run<BFloat16>(d, header, host_sizes);
        break;
      default:
        run<Float32>(d, header, host_sizes);
    }
    std::fwrite(scores.get(), real, rows, stdout);
    std::fwrite(labels.get(), 8, rows, stdout);
    std::fwrite(boxes_xyxy.get(), real, rows * 4, stdout);
    std::fwrite(query_index.get(), 8, rows, stdout);
    std::fwrite(counts.get(), 8, batch, stdout);
  }
}
