#include "reconstruct.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "data_consistency.h"
#include "dipole_filter.h"
#include "error.h"
#include "launch.h"
#include "planning.h"

namespace qsm::host {

namespace {

const char *const kBlends[] = {"auto", "hann", "gaussian", "crop"};

// What a network takes: volumes of the scan's grid, and numbers.
struct Input {
    std::string name;
    Volume values;
    bool is_volume;
    std::vector<size_t> shape;  // of numbers
};

// The TKD map is made of the whole volume, so that patches of it equal the whole.
Volume tkd_map(const TkdSettings &tkd, const Scan &scan, int threads) {
    DipoleFilter filter(scan.geometry, int32_t(tkd.pad_voxels), threads);
    Volume chi = filter.apply(scan.local_field_ppm, filter.multiplier(tkd_response(tkd.threshold)));
    if (tkd.masked) {
        for (size_t n = 0; n < chi.size(); ++n) chi[n] *= float(scan.mask[n]);
    }
    return chi;
}

Input input_from(const std::string &name, const Card &card, const Scan &scan, int threads) {
    const auto three = [](const double (&v)[3]) {
        return Volume{float(v[0]), float(v[1]), float(v[2])};
    };
    if (name == "tkd_chi_ppm") return {name, tkd_map(*card.tkd, scan, threads), true, {}};
    if (name == "mask") return {name, Volume(scan.mask.begin(), scan.mask.end()), true, {}};
    if (name == "voxel_size_mm") return {name, three(scan.geometry.voxel_size_mm), false, {3}};
    if (name == "b0_direction") return {name, three(scan.geometry.b0_direction), false, {1, 3}};
    return {name, {}, true, {}};  // the field, which the scan holds
}

// Runs the network over all patches that touch the mask, and adds them up.
Volume run_patches(Session &session, const Scan &scan, const PatchPlan &plan,
                   const std::vector<Input> &inputs, Caller &caller) {
    const Shape size = plan.patch_shape();
    std::vector<Volume> patches(inputs.size());
    std::vector<Tensor> tensors;
    for (size_t n = 0; n < inputs.size(); ++n) {
        const Input &input = inputs[n];
        if (!input.is_volume) {
            tensors.push_back({input.name, input.shape, input.values.data()});
            continue;
        }
        patches[n].resize(Geometry::voxels_of(size));
        tensors.push_back({input.name,
                           {1, 1, size_t(size[0]), size_t(size[1]), size_t(size[2])},
                           patches[n].data()});
    }
    Volume total(scan.geometry.voxels());
    const int32_t rows = size[0] * size[1];
    for (int64_t index = 0; index < plan.count(); ++index) {
        caller.poll();
        const Patch patch = plan.patch(index);
        if (touches(patch.box, scan.mask)) {
            for (size_t n = 0; n < inputs.size(); ++n) {
                if (!inputs[n].is_volume) continue;
                const Volume &from =
                    inputs[n].values.empty() ? scan.local_field_ppm : inputs[n].values;
                launch(Gather{patch.box, from.data(), patches[n].data()}, rows, nullptr);
            }
            const float *output = session.run(tensors);
            launch(Accumulate{patch.box, output, patch.windows[0], patch.windows[1],
                              patch.windows[2], total.data(), nullptr},
                   rows, nullptr);
        }
        caller.done();
    }
    return total;
}

// Multiplied, not replaced: what is not finite must be seen, outside the mask too.
void mask_finite(Volume &chi, const std::vector<uint8_t> &mask) {
    size_t bad = 0;
    for (size_t n = 0; n < chi.size(); ++n) {
        chi[n] *= float(mask[n]);
        bad += !std::isfinite(chi[n]);
    }
    if (!bad) return;
    throw Error(QSM_ENGINE_ERROR,
                text("the network returned %zu NaN or Inf voxels; check the field", bad));
}

void require_geometry(const Card &card, const Geometry &geometry, const qsm_params &params,
                      const Caller &caller) {
    const std::string found = deviations(card.geometry, geometry);
    if (found.empty()) return;
    if (!params.allow_geometry) {
        throw Error(QSM_DATA_ERROR, found + "; use a network for any geometry such as tkd-unet, or "
                                            "set allow_geometry");
    }
    caller.log(QSM_LOG_WARNING, "outside the training: " + found);
}

void describe(const Decision &decision, const Caller &caller) {
    const PatchPlan &plan = decision.plan;
    const Shape size = plan.patch_shape();
    const std::string shape = text("%d x %d x %d", size[0], size[1], size[2]);
    const std::string peak = ", predicted peak " + memory_text(decision.peak_bytes());
    if (plan.whole) {
        caller.log(QSM_LOG_INFO,
                   "the whole volume as " + shape + peak + ": " + decision.reason);
        return;
    }
    caller.log(decision.exact ? QSM_LOG_INFO : QSM_LOG_WARNING,
               text("%lld patches of ", static_cast<long long>(plan.count())) + shape +
                   text(" that share %d voxels, blend %s, ", plan.overlap, kBlends[plan.blend]) +
                   (decision.exact ? "exact" : "not exact") + peak + ": " + decision.reason);
}

Correction correction_from(const qsm_params &params) {
    if (params.data_consistency_lambda == 0) return Correction::kNone;
    return params.data_consistency_iterations ? Correction::kConjugateGradients
                                              : Correction::kClosedForm;
}

int32_t total_steps(const PatchPlan &plan, const qsm_params &params) {
    const bool corrects = correction_from(params) != Correction::kNone;
    const int64_t steps =
        plan.count() + (corrects ? std::max(params.data_consistency_iterations, 1) : 0);
    return int32_t(std::min<int64_t>(steps, std::numeric_limits<int32_t>::max()));
}

}  // namespace

void Caller::poll() const {
    if (params_.cancel && params_.cancel(params_.user_data)) {
        throw Error(QSM_CANCELLED, "cancelled by the caller");
    }
}

void Caller::done() {
    done_ = std::min(done_ + 1, total_);
    if (params_.progress) params_.progress(done_, total_, params_.user_data);
}

void Caller::all_done() {
    if (done_ < total_ && params_.progress) params_.progress(total_, total_, params_.user_data);
    done_ = total_;
}

void require_params(const qsm_params &params) {
    const auto refuse = [](const std::string &why) { throw Error(QSM_USAGE_ERROR, why); };
    if (params.threads < 0) refuse(text("threads is %d, expected 0 or more", params.threads));
    if (params.memory_order != QSM_X_FASTEST && params.memory_order != QSM_Z_FASTEST) {
        refuse(text("memory_order is %d, no qsm_memory_order", params.memory_order));
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
    const auto weight = static_cast<float>(lambda);
    if (lambda != 0 && !(weight > 0 && std::isfinite(weight))) {
        refuse(text("data_consistency_lambda must be positive and finite in float32, got %g",
                    lambda));
    }
    if (params.data_consistency_iterations < 0) {
        refuse(text("data_consistency_iterations is %d, expected 0 or more",
                    params.data_consistency_iterations));
    }
    if (params.data_consistency_iterations && lambda == 0) {
        refuse("data_consistency_iterations needs data_consistency_lambda");
    }
}

Volume reconstruct(Session &session, Scan &scan, const qsm_params &params, int threads) {
    const Card &card = session.card();
    Caller caller(params);
    const auto erosion = card.constants.find("mask_erosion_voxels");
    if (erosion != card.constants.end() && erosion->second > 0) erode_mask(scan, erosion->second);
    for (const std::string &note : scan.notes) caller.log(QSM_LOG_WARNING, note);
    require_geometry(card, scan.geometry, params, caller);
    const Correction correction = correction_from(params);
    const double limit =
        params.memory_limit_bytes ? double(params.memory_limit_bytes) : available_bytes();
    const Decision decision = decide({card, scan, session.backend(), correction}, params, limit);
    describe(decision, caller);
    caller.expect(total_steps(decision.plan, params));
    caller.poll();
    Volume chi;
    {
        std::vector<Input> inputs;
        for (const TensorInfo &tensor : card.inputs) {
            inputs.push_back(input_from(tensor.name, card, scan, threads));
        }
        chi = run_patches(session, scan, decision.plan, inputs, caller);
    }
    mask_finite(chi, scan.mask);
    if (correction != Correction::kNone) {
        bool begun = false;
        make_consistent(chi, scan, params.data_consistency_lambda,
                        params.data_consistency_iterations, threads, [&] {
                            if (begun) caller.done();
                            begun = true;
                            caller.poll();
                        });
    }
    caller.all_done();
    return chi;
}

}  // namespace qsm::host
