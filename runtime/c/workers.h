// Threads that share the items of one piece of work after the other.
#ifndef QSM_RUNTIME_WORKERS_H
#define QSM_RUNTIME_WORKERS_H

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace qsm::host {

class Workers {
  public:
    explicit Workers(int threads);  // at most one for each core; 0: all cores
    ~Workers();

    int count() const { return int(others_.size()) + 1; }

    // Calls body(item, worker) for every item, on the calling thread too, which is worker 0. The
    // body must not throw. A thread that wakes up late, on a busy machine, is not waited for.
    void over(int32_t items, const std::function<void(int32_t, int)> &body);

  private:
    void work(int worker);
    void wait_for_work(int worker);

    std::vector<std::thread> others_;
    std::mutex mutex_;
    std::condition_variable begun_, ended_;
    const std::function<void(int32_t, int)> *body_ = nullptr;
    std::atomic<int32_t> next_{0};
    int32_t items_ = 0;
    int64_t round_ = 0;
    int busy_ = 0;
    bool stopped_ = false;
};

}  // namespace qsm::host

#endif
