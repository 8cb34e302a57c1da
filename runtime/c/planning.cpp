#include "planning.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "error.h"

namespace qsm::host {

namespace {

constexpr int64_t kTooManyVoxels = int64_t{1} << 31;

struct Overlap {
    int32_t voxels;
    qsm_blend blend;
};

// Chosen by how far the network sees: twice the receptive field, cropped, is exact, twice the
// measured halo comes close. Neither takes more than half of the patch; else half of it fades.
Overlap overlap_and_blend(const Card &card, const qsm_params &params, int32_t patch) {
    const int64_t theoretical = *card.receptive_field.theoretical;
    const int64_t halo = *card.receptive_field.halo;
    int64_t overlap = params.overlap;
    if (overlap == QSM_OVERLAP_AUTO) {
        overlap = std::min<int64_t>(patch - card.divisor, patch / 2);
        for (const int64_t reach : {halo, theoretical}) {
            if (4 * reach <= patch) overlap = 2 * reach;
        }
    }
    auto blend = static_cast<qsm_blend>(params.blend);
    if (blend == QSM_BLEND_AUTO) blend = overlap >= 2 * halo ? QSM_BLEND_CROP : QSM_BLEND_HANN;
    return {int32_t(overlap), blend};
}

// The smallest edge worth running: more than the halo, at least four cells.
int64_t smallest_patch(const Card &card) {
    const int64_t least = std::max(4 * card.divisor, *card.receptive_field.halo + card.divisor);
    return (least + card.divisor - 1) / card.divisor * card.divisor;
}

void require_indexable(const PatchPlan &plan) {
    int64_t voxels = 1;
    for (const int32_t n : plan.patch_shape()) voxels = std::min(voxels * n, kTooManyVoxels);
    if (voxels == kTooManyVoxels) {
        throw Error(QSM_DATA_ERROR,
                    "padded, the volume has more than 2^31 - 1 voxels; crop it");
    }
}

Decision decision_for(const Demand &demand, PatchPlan plan, std::string reason, bool exact) {
    require_indexable(plan);
    Decision decision{std::move(plan), std::move(reason), exact, {}};
    decision.stages = demand.stages(decision.plan);
    return decision;
}

Decision whole(const Demand &demand, std::string reason) {
    const Card &card = demand.card;
    return decision_for(
        demand, plan_whole(demand.scan.geometry.shape, int32_t(card.divisor), card.pad_front),
        std::move(reason), true);
}

Decision in_patches(const Demand &demand, const qsm_params &params, const Box &box, int32_t patch,
                    std::string reason) {
    const Card &card = demand.card;
    const Overlap overlap = overlap_and_blend(card, params, patch);
    PatchPlan plan = plan_patches(box, demand.scan.geometry.shape, int32_t(card.divisor), patch,
                                  overlap.voxels, overlap.blend, card.pad_front);
    const bool exact =
        plan.count() == 1 || (overlap.blend == QSM_BLEND_CROP &&
                              overlap.voxels >= 2 * *card.receptive_field.theoretical);
    return decision_for(demand, std::move(plan), std::move(reason), exact);
}

Decision in_tiles(const Demand &demand, const qsm_params &params) {
    const Card &card = demand.card;
    if (params.patch != QSM_PATCH_AUTO || params.overlap != QSM_OVERLAP_AUTO ||
        params.blend != QSM_BLEND_AUTO) {
        throw Error(QSM_USAGE_ERROR,
                    card.network + " runs in tiles of its own: " + *card.why_whole +
                        "; leave patch, overlap and blend as they are");
    }
    return decision_for(demand, plan_tiles(demand.scan.geometry.shape, *card.tiles),
                        *card.why_whole, true);
}

// Of those that fit the one that computes least, an exact one first; the smallest if none fits. The
// largest patches that fit are not the fastest: eight that overlap by almost all of the volume
// compute it almost eight times.
Decision best_in_patches(const Demand &demand, const qsm_params &params, const Box &box,
                         Decision otherwise, const std::string &reason, double limit_bytes) {
    const Shape &shape = demand.scan.geometry.shape;
    const int64_t divisor = demand.card.divisor;
    const int64_t end = *std::max_element(shape.begin(), shape.end()) + divisor;
    const auto cost = [&](const Decision &decision) {
        const double peak = decision.peak_bytes();
        const bool fits = peak <= limit_bytes;
        const double work = double(decision.plan.count()) *
                            double(Geometry::voxels_of(decision.plan.patch_shape()));
        return std::make_tuple(!fits, fits && !decision.exact,
                               fits && decision.plan.blend != QSM_BLEND_CROP, fits ? work : peak);
    };
    bool found = false;
    for (int64_t size = smallest_patch(demand.card); size < end; size += divisor) {
        Decision next = in_patches(demand, params, box, int32_t(size), reason);
        if (!found || cost(next) < cost(otherwise)) otherwise = std::move(next);
        found = true;
    }
    return otherwise;
}

std::string shape_text(const Shape &shape) {
    return text("%d x %d x %d", shape[0], shape[1], shape[2]);
}

void require_fit(const Decision &decision, double limit_bytes, bool asked) {
    const auto most = std::max_element(
        decision.stages.begin(), decision.stages.end(),
        [](const StageMemory &a, const StageMemory &b) { return a.bytes < b.bytes; });
    if (most->bytes <= limit_bytes) return;
    if (std::isinf(most->bytes)) {
        throw Error(QSM_ENGINE_ERROR, "the engine was built for other sizes than " +
                                          shape_text(decision.plan.patch_shape()) +
                                          "; set patch to one it serves, or build it again");
    }
    const PatchPlan &plan = decision.plan;
    const Shape shape = plan.patch_shape();
    const std::string how =
        plan.whole ? "the whole volume"
                   : text("patches of %d", *std::max_element(shape.begin(), shape.end()));
    const bool smaller_helps = asked && std::string(most->stage) == "inference";
    const std::string way = smaller_helps ? "set patch to QSM_PATCH_AUTO or smaller, " : "";
    throw Error(QSM_MEMORY_ERROR, (asked || plan.whole ? "" : "even ") + how + " would need " +
                                      memory_text(most->bytes) + " in the stage " + most->stage +
                                      ", the limit is " + memory_text(limit_bytes) + "; " + way +
                                      "raise memory_limit_bytes or free memory");
}

}  // namespace

double Decision::peak_bytes() const {
    double most = 0;
    for (const StageMemory &stage : stages) most = std::max(most, stage.bytes);
    return most;
}

Decision decide_at_once(const Shape &grid, const char *method, double bytes, double limit_bytes) {
    Decision decision{plan_whole(grid, 1, "none"), method, true, {{method, bytes}}};
    require_indexable(decision.plan);
    require_fit(decision, limit_bytes, false);
    return decision;
}

Decision decide(const Demand &demand, const qsm_params &params, double limit_bytes) {
    const Card &card = demand.card;
    const bool patchable = card.patchable == "yes";
    const auto chosen = [&]() -> Decision {
        if (card.tiles) return in_tiles(demand, params);
        if (params.patch == QSM_PATCH_OFF || (params.patch == QSM_PATCH_AUTO && !patchable)) {
            if (params.overlap != QSM_OVERLAP_AUTO || params.blend != QSM_BLEND_AUTO) {
                throw Error(QSM_USAGE_ERROR,
                            "overlap and blend need patches; leave them as they "
                            "are or set patch to an edge length");
            }
            return whole(demand, params.patch == QSM_PATCH_OFF ? "asked for" : *card.why_whole);
        }
        if (!patchable) {
            throw Error(QSM_USAGE_ERROR, card.network + " cannot be run in patches: " +
                                             *card.why_whole + "; set patch to QSM_PATCH_OFF");
        }
        const Box box = bounding_box(demand.scan.mask, demand.scan.geometry.shape);
        if (params.patch != QSM_PATCH_AUTO) {
            return in_patches(demand, params, box, params.patch, "asked for");
        }
        Decision at_once = whole(demand, "it fits the memory");
        if (at_once.peak_bytes() <= limit_bytes) return at_once;
        const std::string reason = "the whole volume would need " +
                                   memory_text(at_once.peak_bytes()) + ", more than " +
                                   memory_text(limit_bytes);
        return best_in_patches(demand, params, box, std::move(at_once), reason, limit_bytes);
    }();
    require_fit(chosen, limit_bytes, params.patch != QSM_PATCH_AUTO);
    return chosen;
}

}  // namespace qsm::host
