// Data consistency in a GPU's memory, and what it is made of.
#ifndef QSM_RUNTIME_DEVICE_FILTER_H
#define QSM_RUNTIME_DEVICE_FILTER_H

#include "gpu.h"
#include "request.h"
#include "scan.h"

namespace qsm::host {

// Sums of products of volumes, in double precision; asking for one waits for the stream.
class DeviceSums {
  public:
    DeviceSums(const Gpu &gpu, int64_t count, void *stream);

    double dot(const float *x, const float *y) const;
    void combine(double a, const float *x, double b, float *y) const;  // y = a x + b y

  private:
    const Gpu &gpu_;
    const int64_t count_;
    void *const stream_;
    DeviceMemory memory_;
    void *workspace_;
    double *result_;
};

// What make_consistent_on_device() allocates.
double correction_bytes(const Gpu &gpu, const Scan &scan, Correction correction);

// Takes the step of make_consistent() on a masked map, in place.
void make_consistent_on_device(const Gpu &gpu, const Scan &scan, const qsm_params &params,
                               float *chi, const float *field, void *stream, Caller &caller);

}  // namespace qsm::host

#endif
