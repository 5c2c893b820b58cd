// NVIDIA's driver, as far as Triton's own launcher calls it: an H100 that does nothing.
#define NOTHING(name) \
  int name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLaunchKernelEx)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuPointerGetAttribute)
NOTHING(cuPointerGetAttributes)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)

static char some;
int cuCtxGetCurrent(void** context) { return *context = &some, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int* value, int what, int device) { return *value = what == 97 ? 227 << 10 : 132, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &some, 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuFuncGetAttribute(int* value, int what, void* function) { return *value = what == 0 ? 1024 : 0, 0; }
int cuGetErrorString(int error, const char** text) { return *text = "", 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &some, 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = &some, 0; }
