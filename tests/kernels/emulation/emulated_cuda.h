// The part of CUDA that csrc/detection_topk_cuda.h uses, on one thread of a CPU.
//
// Each thread of a block is a fiber that runs up to the next barrier. Between two barriers the
// fibers take turns in another order each time, so that a missing barrier shows as a wrong result.
// Shared memory is a heap block of the exact size, poisoned: address sanitizer sees what goes
// beyond it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __grid_constant__
#define CDETR_SHARED(type, name) type& name = *static_cast<type*>(emulated::shared(sizeof(type)))

struct Index {
  unsigned x = 0, y = 0;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulated {

constexpr size_t kStack = 128 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  int shuffles = 0;
  void* fake_stack = nullptr;
};

inline std::vector<Fiber> fibers;
inline std::vector<int> exchanged[2];
inline std::vector<char> shared_memory;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline unsigned current;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

inline void* shared(size_t size) {
  if (shared_memory.empty()) shared_memory.assign(size, static_cast<char>(0xa5));
  return shared_memory.data();
}

// The calls to the sanitizer tell it that the stack is another one from here on.
inline void yield(State state) {
  Fiber& self = fibers[current];
  self.state = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &self.fake_stack,
                                 scheduler_stack, scheduler_stack_size);
#endif
  swapcontext(&self.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body();
  yield(State::kDone);
}

inline void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx.x = thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline bool all(unsigned begin, unsigned end, State state) {
  return std::all_of(fibers.begin() + begin, fibers.begin() + end,
                     [state](const Fiber& fiber) { return fiber.state == state; });
}

inline void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

inline void run_block(unsigned threads, std::mt19937& random) {
  fibers = std::vector<Fiber>(threads);
  for (auto& values : exchanged) values.assign(threads, 0);
  shared_memory.clear();
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  while (!all(0, threads, State::kDone)) {
    std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (unsigned thread : order) {
      if (fibers[thread].state != State::kReady) continue;
      resume(thread);
      ran = true;
    }
    for (unsigned warp = 0; warp < threads; warp += 32) {
      if (all(warp, warp + 32, State::kAtWarpBarrier)) release(warp, warp + 32), ran = true;
    }
    if (all(0, threads, State::kAtBlockBarrier)) release(0, threads), ran = true;
    if (!ran) fail("some threads wait at a barrier that others never reach");
  }
}

template <class Kernel>
void launch(unsigned blocks_x, unsigned blocks_y, unsigned threads, Kernel kernel) {
  static std::mt19937 random(0);
  body = kernel;
  gridDim = {blocks_x, blocks_y};
  std::vector<Index> blocks;
  for (unsigned y = 0; y < blocks_y; ++y) {
    for (unsigned x = 0; x < blocks_x; ++x) blocks.push_back({x, y});
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const Index& block : blocks) {
    blockIdx = block;
    run_block(threads, random);
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::yield(emulated::State::kAtBlockBarrier); }

inline void __threadfence() {}

inline int __shfl_up_sync(unsigned, int value, int offset) {
  using namespace emulated;
  const unsigned thread = current;
  auto& values = exchanged[fibers[thread].shuffles++ % 2];  // the next one may come before all read
  values[thread] = value;
  yield(State::kAtWarpBarrier);
  return thread % 32 >= static_cast<unsigned>(offset) ? values[thread - offset] : value;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}
