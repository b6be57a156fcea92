// A stand-in for NVIDIA's driver that writes down what it is asked, compiled against the driver's own header, so that a
// call with other types does not compile. tests/test_cuda_driver.py reads the record.
#include <cuda.h>
#include <string.h>

struct {
  int calls;
  CUlaunchConfig config;
  CUlaunchAttribute attributes[4];
  CUfunction function;
  unsigned char params[4096];
  CUdeviceptr filled;
  size_t filled_bytes;
  unsigned char filled_with;
  CUstream fill_stream;
  CUcontext current;
  int dynamic_bytes, carveout;
  int refuses_cubin;
} record;
size_t param_bytes[4];
int next_error;

static CUresult done(void) {
  const int error = next_error;
  next_error = 0;
  ++record.calls;
  return (CUresult)error;
}

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 200000 : -1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)(size_t)(100 + device), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return record.current = context, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (record.refuses_cubin && memcmp(image,
                                     "\x7f"
                                     "ELF",
                                     4) == 0)
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  return *module = (CUmodule)(size_t)200, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (strcmp(name, "missing") == 0) return CUDA_ERROR_NOT_FOUND;
  return *function = (CUfunction)(size_t)(300 + name[strlen(name) - 1]), CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) record.dynamic_bytes = value;
  if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) record.carveout = value;
  return done();
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t bytes) {
  return *blocks = threads == 640 && bytes < 200000 ? 1 : 0, CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) {
  return *text = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : NULL, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "invalid argument", CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params, void** extra) {
  record.config = *config;
  record.function = function;
  for (unsigned i = 0; i < config->numAttrs && i < 4; ++i) record.attributes[i] = config->attrs[i];
  for (size_t i = 0, at = 0; i < 4 && param_bytes[i]; at += param_bytes[i++])
    memcpy(record.params + at, params[i], param_bytes[i]);
  return extra ? CUDA_ERROR_INVALID_VALUE : done();
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream) {
  record.filled = at, record.filled_bytes = bytes, record.filled_with = value, record.fill_stream = stream;
  return done();
}

// What the test reads of the record.
int grid_x(void) { return record.config.gridDimX; }
int grid_y(void) { return record.config.gridDimY; }
int grid_z(void) { return record.config.gridDimZ; }
int block_x(void) { return record.config.blockDimX; }
int block_yz(void) { return record.config.blockDimY * record.config.blockDimZ; }
int shared_bytes(void) { return record.config.sharedMemBytes; }
size_t launch_stream(void) { return (size_t)record.config.hStream; }
size_t function(void) { return (size_t)record.function; }
size_t current(void) { return (size_t)record.current; }
int num_attributes(void) { return record.config.numAttrs; }
static const CUlaunchAttribute* attribute(CUlaunchAttributeID id) {
  for (unsigned i = 0; i < record.config.numAttrs; ++i)
    if (record.attributes[i].id == id) return record.attributes + i;
  return NULL;
}
int is_cooperative(void) {
  const CUlaunchAttribute* found = attribute(CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
  return found ? found->value.cooperative : 0;
}
int is_early(void) {
  const CUlaunchAttribute* found = attribute(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
  return found ? found->value.programmaticStreamSerializationAllowed : 0;
}
int cluster(void) {
  const CUlaunchAttribute* found = attribute(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
  if (!found) return 0;
  return found->value.clusterDim.y == 1 && found->value.clusterDim.z == 1 ? found->value.clusterDim.x : -1;
}
const unsigned char* params(void) { return record.params; }
size_t filled(void) { return record.filled; }
size_t filled_bytes(void) { return record.filled_bytes; }
int filled_with(void) { return record.filled_with; }
size_t fill_stream(void) { return (size_t)record.fill_stream; }
int dynamic_bytes(void) { return record.dynamic_bytes; }
int carveout(void) { return record.carveout; }
int calls(void) { return record.calls; }
void refuse_cubins(int refuses) { record.refuses_cubin = refuses; }
