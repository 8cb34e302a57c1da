#include "workers.h"

#include <algorithm>
#include <system_error>

namespace qsm::host {

Workers::Workers(int threads) {
    const int cores = int(std::thread::hardware_concurrency());
    const int wanted = threads ? std::min(threads, std::max(cores, 1)) : cores;
    try {
        for (int n = 1; n < wanted; ++n) others_.emplace_back([this, n] { wait_for_work(n); });
    } catch (const std::system_error &) {  // too many threads: those that began do it all
    }
}

Workers::~Workers() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
    }
    begun_.notify_all();
    for (std::thread &other : others_) other.join();
}

void Workers::over(int32_t items, const std::function<void(int32_t, int)> &body) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        body_ = &body;
        items_ = items;
        next_ = 0;
        ++round_;
    }
    begun_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, [this] { return busy_ == 0; });
    body_ = nullptr;
}

void Workers::work(int worker) {
    for (int32_t item; (item = next_++) < items_;) (*body_)(item, worker);
}

void Workers::wait_for_work(int worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int64_t seen = 0;;) {
        begun_.wait(lock, [&] { return stopped_ || (body_ && round_ != seen); });
        if (stopped_) return;
        seen = round_;
        ++busy_;
        lock.unlock();
        work(worker);
        lock.lock();
        if (--busy_ == 0) ended_.notify_one();
    }
}

}  // namespace qsm::host
