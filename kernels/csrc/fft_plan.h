// The pair of transforms of one shape. No CUDA header is needed here; see device.h.
#ifndef QSM_FFT_PLAN_H
#define QSM_FFT_PLAN_H

#include <cstddef>
#include <memory>
#include <mutex>

#include "scale_spectrum.h"
#include "status.h"

namespace qsm {

struct PlanKey {
    int gpu;
    int32_t batch, x, y, z;

    bool operator==(const PlanKey &other) const {
        return gpu == other.gpu && batch == other.batch && x == other.x && y == other.y &&
               z == other.z;
    }
};

class FftPlan {
  public:
    static Status make(const PlanKey &key, std::shared_ptr<FftPlan> &made);
    ~FftPlan();

    // Bytes of scratch memory that a transform needs, beside its input and output.
    size_t work_bytes() const { return work_bytes_; }

    // From bind to the last transform the caller holds `in_use`: stream and memory are the plan's.
    std::mutex in_use;
    Status bind(void *work, void *stream);
    Status forward(const float *volumes, Complex *spectra);
    Status inverse(Complex *spectra, float *volumes);  // not divided by N; destroys the spectra

  private:
    explicit FftPlan(const PlanKey &key) : key_(key) {}

    PlanKey key_;
    int forward_ = -1, inverse_ = -1;  // cufftHandle; -1 is none
    size_t work_bytes_ = 0;
};

}  // namespace qsm

#endif
