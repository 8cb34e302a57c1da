#include "tensorrt_plugin.h"

#include "tensorrt_report.h"

namespace qsm {
namespace {

Shape shape_of(const nvinfer1::Dims &dims) { return {dims.d, dims.nbDims}; }

nvinfer1::PluginFieldType type_of(FieldType type) {
    return type == FieldType::kText ? nvinfer1::PluginFieldType::kCHAR
                                    : nvinfer1::PluginFieldType::kFLOAT32;
}

// Sizes that are known when the network is made, -1 for the others.
nvinfer1::Dims known_sizes(const nvinfer1::DimsExprs &dims) {
    nvinfer1::Dims known{dims.nbDims, {}};
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
        known.d[axis] = dims.d[axis]->isConstant() ? dims.d[axis]->getConstantValue() : -1;
    }
    return known;
}

}  // namespace

PluginFields::PluginFields(const DipoleNode &node) {
    const auto fields = node.fields();
    for (size_t index = 0; index < fields.size(); ++index) {
        const Field &field = fields[index];
        fields_[index] = {field.name, field.data, type_of(field.type), field.length};
    }
}

const nvinfer1::PluginFieldCollection *PluginFields::collection() {
    collection_ = {kNodeFields, fields_.data()};
    return &collection_;
}

DipoleConvPlugin::DipoleConvPlugin(const DipoleNode &node, nvinfer1::IErrorRecorder *recorder)
    : node_(node), fields_(node_), recorder_(recorder) {}

nvinfer1::IPluginCapability *DipoleConvPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore *>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild *>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3 *DipoleConvPlugin::copy(nvinfer1::IErrorRecorder *recorder) const noexcept {
    nvinfer1::IPluginV3 *made = nullptr;
    reported(recorder, [&] {
        made = new DipoleConvPlugin(node_, recorder);
        return QSM_CUDA_OK;
    });
    return made;
}

nvinfer1::IPluginV3 *DipoleConvPlugin::clone() noexcept { return copy(recorder_); }

nvinfer1::IPluginV3 *DipoleConvPlugin::attachToContext(
    nvinfer1::IPluginResourceContext *context) noexcept {
    return copy(context ? context->getErrorRecorder() : nullptr);
}

const nvinfer1::PluginFieldCollection *DipoleConvPlugin::getFieldsToSerialize() noexcept {
    return fields_.collection();
}

int32_t DipoleConvPlugin::getOutputDataTypes(nvinfer1::DataType *outputs, int32_t,
                                             const nvinfer1::DataType *, int32_t) const noexcept {
    outputs[0] = nvinfer1::DataType::kFLOAT;
    return QSM_CUDA_OK;
}

int32_t DipoleConvPlugin::getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t input_count,
                                          const nvinfer1::DimsExprs *, int32_t,
                                          nvinfer1::DimsExprs *outputs, int32_t,
                                          nvinfer1::IExprBuilder &) noexcept {
    return reported(recorder_, [&] {
        nvinfer1::Dims known[kNodeInputs];
        Shape shapes[kNodeInputs];
        for (int32_t index = 0; index < std::min(input_count, kNodeInputs); ++index) {
            known[index] = known_sizes(inputs[index]);
            shapes[index] = shape_of(known[index]);
        }
        QSM_TRY(check_inputs(shapes, input_count));
        outputs[0] = inputs[0];
        return QSM_CUDA_OK;
    });
}

// float32 whatever the engine's precision: cuFFT transforms half precision in powers of two only.
bool DipoleConvPlugin::supportsFormatCombination(int32_t position,
                                                 const nvinfer1::DynamicPluginTensorDesc *tensors,
                                                 int32_t, int32_t) noexcept {
    const nvinfer1::PluginTensorDesc &tensor = tensors[position].desc;
    return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
           tensor.type == nvinfer1::DataType::kFLOAT;
}

int32_t DipoleConvPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t,
                                          const nvinfer1::DynamicPluginTensorDesc *,
                                          int32_t) noexcept {
    return reported(recorder_, [&] {
        qsm_cuda_dipole op = node_.op();
        return set_shape(shape_of(inputs[0].max), op);
    });
}

size_t DipoleConvPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t,
                                          const nvinfer1::DynamicPluginTensorDesc *,
                                          int32_t) const noexcept {
    size_t bytes = 0;  // TensorRT takes no failure here; onShapeChange meets it again
    reported(recorder_, [&] {
        return workspace_of(node_, shape_of(inputs[0].min), shape_of(inputs[0].max), bytes);
    });
    return bytes;
}

int32_t DipoleConvPlugin::onShapeChange(const nvinfer1::PluginTensorDesc *inputs,
                                        int32_t input_count, const nvinfer1::PluginTensorDesc *,
                                        int32_t) noexcept {
    return reported(recorder_, [&] {
        Shape shapes[kNodeInputs];
        for (int32_t index = 0; index < std::min(input_count, kNodeInputs); ++index) {
            shapes[index] = shape_of(inputs[index].dims);
        }
        QSM_TRY(check_inputs(shapes, input_count));
        return prepare(node_, shapes[0], prepared_);
    });
}

int32_t DipoleConvPlugin::enqueue(const nvinfer1::PluginTensorDesc *input_descriptions,
                                  const nvinfer1::PluginTensorDesc *, const void *const *inputs,
                                  void *const *outputs, void *workspace,
                                  cudaStream_t stream) noexcept {
    return reported(recorder_, [&] {
        if (!prepared_.is_for(shape_of(input_descriptions[0].dims))) {
            return fail(QSM_CUDA_NOT_PREPARED, "x has another shape than onShapeChange was told");
        }
        const auto *const *floats = reinterpret_cast<const float *const *>(inputs);
        return qsm_cuda_dipole_apply_device_geometry(
            &prepared_.op, floats[1], floats[2], floats[0], static_cast<float *>(outputs[0]),
            workspace, prepared_.workspace_bytes, stream);
    });
}

}  // namespace qsm
