// The values used last, a bounded number of them, shared by all threads.
#ifndef QSM_PLAN_CACHE_H
#define QSM_PLAN_CACHE_H

#include <list>
#include <memory>
#include <mutex>

#include "status.h"

namespace qsm {

template <class Key, class Value>
class PlanCache {
  public:
    explicit PlanCache(size_t capacity) : capacity_(capacity) {}

    // Sets `found` to the value of the key, which make(key, found) makes if it is not there. A
    // value that a CUDA graph records is kept until clear(), and never made while recording.
    // The lock is held while making: two threads must not make the same plan twice.
    template <class Make>
    Status find_or_make(const Key &key, bool captured, Make &&make, std::shared_ptr<Value> &found) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
            if (!(entry->key == key)) continue;
            entries_.splice(entries_.begin(), entries_, entry);
            entry->kept = entry->kept || captured;
            found = entry->value;
            return QSM_CUDA_OK;
        }
        if (captured) {
            return fail(QSM_CUDA_NOT_PREPARED,
                        "the stream is captured and this shape has no FFT plans yet; call "
                        "qsm_cuda_dipole_workspace() for it before the capture begins");
        }
        Status status = make(key, found);
        if (status == QSM_CUDA_OUT_OF_MEMORY) {
            evict(0);  // the other plans' tables may be what fills the memory
            status = make(key, found);
        }
        if (status) return status;
        entries_.push_front({key, found, false});
        evict(capacity_);
        return QSM_CUDA_OK;
    }

    void clear() {
        const std::lock_guard<std::mutex> lock(mutex_);
        entries_.clear();
    }

  private:
    struct Entry {
        Key key;
        std::shared_ptr<Value> value;
        bool kept;
    };

    // Drops the oldest values beyond a number of them, those to keep not counted. A value that
    // another thread is using goes when that thread lets go of it.
    void evict(size_t number) {
        size_t seen = 0;
        entries_.remove_if([&](const Entry &entry) { return !entry.kept && seen++ >= number; });
    }

    const size_t capacity_;
    std::mutex mutex_;
    std::list<Entry> entries_;  // used last, first
};

}  // namespace qsm

#endif
