// The dipole operator on a padded grid in a GPU's memory, and data consistency made of it.
#ifndef QSM_RUNTIME_DEVICE_FILTER_H
#define QSM_RUNTIME_DEVICE_FILTER_H

#include "gpu.h"
#include "request.h"
#include "scan.h"

namespace qsm::host {

// y = crop(F^-1 [E F pad(x)]), masked if it is to be, enqueued on one stream.
class DeviceFilter {
  public:
    DeviceFilter(const Gpu &gpu, const Scan &scan, int32_t pad_voxels, void *stream);

    // What it allocates.
    static double bytes(const Gpu &gpu, const Geometry &geometry, int32_t pad_voxels);

    // `y` may be `x`. `parameter` is TKD's threshold or Tikhonov's lambda.
    void apply(qsm_cuda_multiplier multiplier, double parameter, const float *x, float *y,
               bool masked);

  private:
    const Gpu &gpu_;
    void *const stream_;
    DeviceMemory memory_;
    qsm_cuda_dipole operator_;
    qsm_cuda_patch grow_, crop_;
    size_t workspace_bytes_;
    float *padded_;
    uint8_t *padded_mask_;
    void *workspace_;
};

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
