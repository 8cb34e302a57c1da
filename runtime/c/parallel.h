// Work shared by threads that live as long as it does.
#ifndef QSM_RUNTIME_PARALLEL_H
#define QSM_RUNTIME_PARALLEL_H

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace qsm::host {

// Returns how many threads a parameter asks for, 0 being all cores.
inline int workers_of(int threads) {
    const auto cores = int(std::thread::hardware_concurrency());
    return threads ? threads : cores ? cores : 1;
}

// Calls body(item, worker) for every item; it must not throw.
template <class Body>
void parallel(int workers, int32_t items, const Body &body) {
    std::atomic<int32_t> next{0};
    const auto work = [&](int worker) {
        for (int32_t item; (item = next++) < items;) body(item, worker);
    };
    std::vector<std::thread> others;
    others.reserve(size_t(workers));
    try {
        for (int worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
    } catch (const std::system_error &) {  // too many threads: those that began do it all
    }
    work(0);
    for (std::thread &other : others) other.join();
}

}  // namespace qsm::host

#endif
