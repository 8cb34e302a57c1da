#include "method.h"

#include <cmath>

#include "dipole_filter.h"
#include "error.h"
#include "field_noise.h"
#include "memory.h"
#include "planning.h"
#include "reconstruct.h"
#include "request.h"
#include "total_variation.h"

namespace qsm::host {

namespace {

constexpr int32_t kIterations = 30;
constexpr double kTkdThreshold = 0.2;
constexpr int32_t kTkdPadVoxels = 8;

// Says how it will be run, once that is known to fit.
void begin(Caller &caller, const Shape &grid, const char *name, double bytes, int32_t steps,
           const qsm_params &params) {
    caller.begin(decide_at_once(grid, name, bytes, limit_bytes(params)), steps);
}

Volume tv_map(const Scan &scan, const qsm_params &params, int threads, Caller &caller,
              qsm_facts &facts) {
    const PaddedBox grid(scan);
    facts.iterations = params.iterations ? params.iterations : kIterations;
    begin(caller, grid.geometry.shape, "tv", tv_bytes(scan.geometry, grid.geometry),
          facts.iterations, params);
    facts.sigma_ppm = field_noise(scan, grid.box, threads);
    facts.alpha_ppm_mm = params.alpha_ppm_mm != 0 ? params.alpha_ppm_mm
                                                  : alpha_of_noise(facts.sigma_ppm, scan.geometry);
    if (!(facts.alpha_ppm_mm > 0)) {
        throw Error(QSM_DATA_ERROR,
                    "the field is the same in the whole mask, which leaves nothing to tell its "
                    "noise from; set alpha_ppm_mm");
    }
    caller.log(QSM_LOG_INFO, text("tv: sigma %.3g ppm, alpha %.3g ppm mm%s", facts.sigma_ppm,
                                  facts.alpha_ppm_mm, params.alpha_ppm_mm != 0 ? ", given" : ""));
    TotalVariation tv(grid, facts.alpha_ppm_mm, threads);
    tv.run(facts.iterations, caller);
    facts.last_change = tv.last_change();
    caller.log(QSM_LOG_INFO, text("tv: %d iterations, the last changed the map by %.2g %%",
                                  facts.iterations, 100 * facts.last_change));
    return tv.map();
}

Volume tkd_map(const Scan &scan, const qsm_params &params, int threads, Caller &caller) {
    const Geometry padded = scan.geometry.padded(kTkdPadVoxels);
    begin(caller, padded.shape, "tkd", tkd_bytes(scan.geometry, padded), 1, params);
    const double threshold = params.threshold != 0 ? params.threshold : kTkdThreshold;
    DipoleFilter filter(scan.geometry, kTkdPadVoxels, threads);
    Volume chi = filter.apply(scan.local_field_ppm, filter.multiplier(tkd_response(threshold)));
    caller.done();
    return chi;
}

}  // namespace

Method method_of(const std::string &name) {
    if (name == "tv") return Method::kTv;
    if (name == "tkd") return Method::kTkd;
    throw Error(QSM_USAGE_ERROR, "there is no method \"" + name + "\"; there are tv and tkd");
}

void require_params_of(Method method, const qsm_params &params) {
    const auto refuse = [](const char *why) { throw Error(QSM_USAGE_ERROR, why); };
    if (method != Method::kTv && (params.alpha_ppm_mm != 0 || params.iterations)) {
        refuse("alpha_ppm_mm and iterations are for the method tv; leave them 0");
    }
    if (method != Method::kTkd && params.threshold != 0) {
        refuse("threshold is for the method tkd; leave it 0");
    }
    if (method == Method::kNone) return;
    if (params.patch > 0 || params.overlap != QSM_OVERLAP_AUTO || params.blend != QSM_BLEND_AUTO) {
        refuse("tv and tkd take the whole volume; leave patch, overlap and blend as they are");
    }
    if (params.data_consistency_lambda != 0) {
        refuse("tv and tkd fit the field themselves; leave data_consistency_lambda 0");
    }
}

Volume reconstruct_by(Method method, const Scan &scan, const qsm_params &params, int threads,
                      qsm_facts &facts) {
    Caller caller(params);
    for (const std::string &note : scan.notes) caller.log(QSM_LOG_WARNING, note);
    const bool tv = method == Method::kTv;
    Volume chi = tv ? tv_map(scan, params, threads, caller, facts)
                    : tkd_map(scan, params, threads, caller);
    mask_finite(chi, scan.mask, tv ? "tv" : "tkd");
    return chi;
}

}  // namespace qsm::host
