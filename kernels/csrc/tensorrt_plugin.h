// `qsm::DipoleConv` for TensorRT 10 and 11. A library serves the major version whose headers it was
// compiled with, for they changed the layout of what TensorRT hands over (ILoggerFinder).
//
// Voxel size and B0 direction stay on the GPU: TensorRT hands a plugin values on the host for shape
// tensors only, which are whole numbers; to copy the floats there would mean waiting for the GPU at
// every run. So a kernel reads them, and a plan serves every scan.
#ifndef QSM_TENSORRT_PLUGIN_H
#define QSM_TENSORRT_PLUGIN_H

#include <NvInferRuntime.h>

#include "dipole_node.h"

namespace qsm {

// The fields of a node as TensorRT's. They point into the node.
class PluginFields {
  public:
    explicit PluginFields(const DipoleNode &node);
    const nvinfer1::PluginFieldCollection *collection();

  private:
    std::array<nvinfer1::PluginField, kNodeFields> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

class DipoleConvPlugin final : public nvinfer1::IPluginV3,
                               public nvinfer1::IPluginV3OneCore,
                               public nvinfer1::IPluginV3OneBuild,
                               public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit DipoleConvPlugin(const DipoleNode &node,
                              nvinfer1::IErrorRecorder *recorder = nullptr);

    nvinfer1::IPluginCapability *getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3 *clone() noexcept override;

    const char *getPluginName() const noexcept override { return kNodeName; }
    const char *getPluginVersion() const noexcept override { return kNodeVersion; }
    const char *getPluginNamespace() const noexcept override { return ""; }

    int32_t getNbOutputs() const noexcept override { return kNodeOutputs; }
    int32_t getOutputDataTypes(nvinfer1::DataType *outputs, int32_t output_count,
                               const nvinfer1::DataType *inputs,
                               int32_t input_count) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t input_count,
                            const nvinfer1::DimsExprs *shape_inputs, int32_t shape_input_count,
                            nvinfer1::DimsExprs *outputs, int32_t output_count,
                            nvinfer1::IExprBuilder &builder) noexcept override;
    bool supportsFormatCombination(int32_t position,
                                   const nvinfer1::DynamicPluginTensorDesc *tensors,
                                   int32_t input_count, int32_t output_count) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t input_count,
                            const nvinfer1::DynamicPluginTensorDesc *outputs,
                            int32_t output_count) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t input_count,
                            const nvinfer1::DynamicPluginTensorDesc *outputs,
                            int32_t output_count) const noexcept override;

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc *inputs, int32_t input_count,
                          const nvinfer1::PluginTensorDesc *outputs,
                          int32_t output_count) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc *input_descriptions,
                    const nvinfer1::PluginTensorDesc *output_descriptions,
                    const void *const *inputs, void *const *outputs, void *workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3 *attachToContext(
        nvinfer1::IPluginResourceContext *context) noexcept override;
    const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override;

  private:
    nvinfer1::IPluginV3 *copy(nvinfer1::IErrorRecorder *recorder) const noexcept;

    const DipoleNode node_;
    PluginFields fields_;
    nvinfer1::IErrorRecorder *recorder_;  // the execution context's, once there is one
    PreparedNode prepared_;
};

}  // namespace qsm

#endif
