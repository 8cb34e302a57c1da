#include "request.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

namespace qsm::host {

namespace {

// for which float32 holds the map; those of qsm-run
constexpr double kLeastWeight = 1e-9, kMostWeight = 1e3, kLeastThreshold = 1e-3;
constexpr int32_t kMostIterations = 10'000;

const char *const kBlends[] = {"auto", "hann", "gaussian", "crop"};

void require_geometry(const Card &card, const Geometry &geometry, const qsm_params &params,
                      const Caller &caller) {
    const std::string found = deviations(card.geometry, geometry);
    if (found.empty()) return;
    if (!params.allow_geometry) {
        throw Error(QSM_DATA_ERROR,
                    found + "; this library neither turns nor resamples, qsm-run does; or use a "
                            "network for any geometry such as tv-unet, or set allow_geometry");
    }
    caller.log(QSM_LOG_WARNING, "outside the training: " + found);
}

int32_t total_steps(int64_t runs, const qsm_params &params) {
    const bool corrects = correction_from(params) != Correction::kNone;
    const int64_t steps =
        runs + (corrects ? std::max(params.data_consistency_iterations, 1) : 0);
    return int32_t(std::min<int64_t>(steps, std::numeric_limits<int32_t>::max()));
}

}  // namespace

Correction correction_from(const qsm_params &params) {
    if (params.data_consistency_lambda == 0) return Correction::kNone;
    return params.data_consistency_iterations ? Correction::kConjugateGradients
                                              : Correction::kClosedForm;
}

void Caller::log(qsm_log_level level, const std::string &line) const {
    if (params_.log) params_.log(level, line.c_str(), params_.user_data);
}

void Caller::begin(const Decision &decision, int64_t runs) {
    const PatchPlan &plan = decision.plan;
    const Shape size = plan.patch_shape();
    const std::string shape = text("%d x %d x %d", size[0], size[1], size[2]);
    const std::string peak = ", predicted peak " + memory_text(decision.peak_bytes());
    if (plan.whole) {
        log(QSM_LOG_INFO, "the whole volume as " + shape + peak + ": " + decision.reason);
    } else {
        log(decision.exact ? QSM_LOG_INFO : QSM_LOG_WARNING,
            text("%lld patches of ", static_cast<long long>(plan.count())) + shape +
                text(" that share %d voxels, blend %s, ", plan.overlap, kBlends[plan.blend]) +
                (decision.exact ? "exact" : "not exact") + peak + ": " + decision.reason);
    }
    total_ = total_steps(runs, params_);
    poll();
}

void Caller::poll() const {
    if (params_.cancel && params_.cancel(params_.user_data)) {
        throw Error(QSM_CANCELLED, "cancelled by the caller");
    }
}

void Caller::done() {
    done_ = std::min(done_ + 1, total_);
    if (params_.progress) params_.progress(done_, total_, params_.user_data);
}

void Caller::end() {
    if (done_ < total_ && params_.progress) params_.progress(total_, total_, params_.user_data);
    done_ = total_;
}

void require_params(const qsm_params &params) {
    const auto refuse = [](const std::string &why) { throw Error(QSM_USAGE_ERROR, why); };
    if (params.threads < 0) refuse(text("threads is %d, expected 0 or more", params.threads));
    if (params.device < QSM_DEVICE_AUTO || params.device > QSM_DEVICE_GPU) {
        refuse(text("device is %d, no qsm_device", params.device));
    }
    if (params.memory_order != QSM_X_FASTEST && params.memory_order != QSM_Z_FASTEST) {
        refuse(text("memory_order is %d, no qsm_memory_order", params.memory_order));
    }
    if (params.axes[0]) {
        axes_named({params.axes, std::find(params.axes, std::end(params.axes), '\0')});
    }
    if (params.blend < QSM_BLEND_AUTO || params.blend > QSM_BLEND_CROP) {
        refuse(text("blend is %d, no qsm_blend", params.blend));
    }
    if (params.patch < QSM_PATCH_OFF) {
        refuse(text("patch is %d, expected an edge length, QSM_PATCH_AUTO or QSM_PATCH_OFF",
                    params.patch));
    }
    if (params.overlap < QSM_OVERLAP_AUTO) {
        refuse(text("overlap is %d, expected voxels or QSM_OVERLAP_AUTO", params.overlap));
    }
    const double lambda = params.data_consistency_lambda;
    if (lambda != 0 && !(lambda >= kLeastWeight && lambda <= kMostWeight)) {
        refuse(text("data_consistency_lambda must be 0, or 1e-9 to 1000, got %g", lambda));
    }
    const auto require_iterations = [&](const char *name, int32_t count) {
        if (count >= 0 && count <= kMostIterations) return;
        refuse(text("%s is %d, expected 0 to %d", name, count, kMostIterations));
    };
    require_iterations("data_consistency_iterations", params.data_consistency_iterations);
    if (params.data_consistency_iterations && lambda == 0) {
        refuse("data_consistency_iterations needs data_consistency_lambda");
    }
    const double alpha = params.alpha_ppm_mm;
    if (alpha != 0 && !(alpha >= kLeastWeight && alpha <= kMostWeight)) {
        refuse(text("alpha_ppm_mm must be 0, or 1e-9 to 1000, got %g", alpha));
    }
    require_iterations("iterations", params.iterations);
    const double threshold = params.threshold;
    if (threshold != 0 && !(threshold >= kLeastThreshold && threshold <= 2.0 / 3)) {
        refuse(text("threshold must be 0, or 0.001 to 2/3, got %g", threshold));
    }
}

void prepare(Scan &scan, const Card &card, const qsm_params &params, const Caller &caller) {
    if (correction_from(params) != Correction::kNone && card.task != "local_field->chi") {
        throw Error(QSM_USAGE_ERROR, "data_consistency_lambda is for a map of a local field, " +
                                         card.network + " is for " + card.task + "; leave it 0");
    }
    const auto erosion = card.constants.find("mask_erosion_voxels");
    if (erosion != card.constants.end() && erosion->second > 0) erode_mask(scan, erosion->second);
    for (const std::string &note : scan.notes) caller.log(QSM_LOG_WARNING, note);
    require_geometry(card, scan.geometry, params, caller);
}

Error not_finite(size_t voxels, const std::string &whose) {
    return {QSM_ENGINE_ERROR, whose + " returned " +
                                  (voxels ? std::to_string(voxels) + " NaN or Inf voxels"
                                          : std::string("NaN or Inf")) +
                                  "; check the field"};
}

}  // namespace qsm::host
