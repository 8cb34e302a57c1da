// What TensorRT asks a plugin library for when it loads it by its path.
#include <vector>

#include "tensorrt_plugin.h"
#include "tensorrt_report.h"

namespace qsm {
namespace {

FieldType type_of(nvinfer1::PluginFieldType type) {
    switch (type) {
        case nvinfer1::PluginFieldType::kCHAR:
            return FieldType::kText;
        case nvinfer1::PluginFieldType::kFLOAT32:
            return FieldType::kFloat32;
        default:
            return FieldType::kOther;
    }
}

Status read_node(const nvinfer1::PluginFieldCollection *given, DipoleNode &node) {
    std::vector<Field> fields;
    for (int32_t index = 0; given && index < given->nbFields; ++index) {
        const nvinfer1::PluginField &field = given->fields[index];
        fields.push_back({field.name, field.data, type_of(field.type), field.length});
    }
    return read_node(fields.data(), static_cast<int32_t>(fields.size()), node);
}

// Its namespace is the empty one: parsers of TensorRT 10 look for a node's plugin there only, later
// ones there first.
class DipoleConvCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    // The node is the same while a plan is built and when one is loaded, and so are its fields.
    nvinfer1::IPluginV3 *createPlugin(const char *, const nvinfer1::PluginFieldCollection *fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        nvinfer1::IPluginV3 *made = nullptr;
        reported(nullptr, [&] {
            DipoleNode node;
            QSM_TRY(read_node(fields, node));
            made = new DipoleConvPlugin(node);
            return QSM_CUDA_OK;
        });
        return made;
    }

    const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override {
        return fields_.collection();
    }

    const char *getPluginName() const noexcept override { return kNodeName; }
    const char *getPluginVersion() const noexcept override { return kNodeVersion; }
    const char *getPluginNamespace() const noexcept override { return ""; }

  private:
    const DipoleNode defaults_;
    PluginFields fields_{defaults_};
};

}  // namespace
}  // namespace qsm

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface *const *
getCreators(int32_t &count) {
    static qsm::DipoleConvCreator creator;
    static nvinfer1::IPluginCreatorInterface *const creators[] = {&creator};
    count = 1;
    return creators;
}
