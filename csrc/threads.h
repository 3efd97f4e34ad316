// A small pool: the caller is worker 0. Each worker has its own stretch of a job's tiles and takes from the
// others' when it is done, since cores are shared and of unequal speed.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

namespace gossamer {

class Pool {
 public:
  // threads <= 0: one per processor of the process's affinity mask. Workers spin briefly, then sleep.
  // Throws std::system_error where the system refuses a thread.
  explicit Pool(int threads);
  ~Pool();
  int size() const;
  // Calls fn(context, tile, worker) for every tile in [0, tiles); returns when all are done.
  // tiles == 1 runs in the caller without waking anyone.
  using Fn = void (*)(void* context, int64_t tile, int worker);
  void run(int64_t tiles, Fn fn, void* context);

  template <class F>
  void parallel(int64_t tiles, F&& f) {
    run(
        tiles,
        [](void* c, int64_t tile, int worker) {
          (*static_cast<std::remove_reference_t<F>*>(c))(tile, worker);
        },
        &f);
  }

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace gossamer
