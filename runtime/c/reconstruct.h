// From what was measured to a susceptibility map, whole or in patches; see runtime/pipeline.py.
#ifndef QSM_RUNTIME_RECONSTRUCT_H
#define QSM_RUNTIME_RECONSTRUCT_H

#include "device_session.h"
#include "qsm_runtime.h"
#include "scan.h"
#include "session.h"

namespace qsm::host {

// Returns the map of a scan, 0 outside its mask.
Volume reconstruct(Session &session, Scan &scan, const qsm_params &params, int threads);

// The same on a GPU. The map goes to `chi_ppm` there or, if that is null, is returned.
Volume reconstruct_on_device(DeviceSession &session, Scan &scan, const qsm_params &params,
                             int threads, float *chi_ppm, void *stream);

// Multiplies a map by its mask. Throws, naming what made it, if it is not finite.
void mask_finite(Volume &chi, const std::vector<uint8_t> &mask, const char *whose);

// Reads a scan whose volumes lie on a GPU, behind the work of a stream.
Scan scan_from_device(const qsm_scan &scan, const Layout &layout, FieldKind kind, void *stream);

}  // namespace qsm::host

#endif
