/* A CUDA driver that runs nothing: it writes down what it was called with, as the real one would read it. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char log_text[1 << 16], failing[64], layout[128];
static int failing_code, next_handle;
static uintptr_t current;

const char *fake_log(void) { return log_text; }
void fake_reset(void) { log_text[0] = failing[0] = 0; current = 0; next_handle = 0; }
void fake_fail(const char *name, int code) { strcpy(failing, name); failing_code = code; }
/* Types of the parameters of the next launches: p pointer, i int32, l int64, f float. */
void fake_layout(const char *types) { strcpy(layout, types); }

#define LOG(...) snprintf(log_text + strlen(log_text), sizeof log_text - strlen(log_text), __VA_ARGS__)
#define MAY_FAIL if (!strcmp(failing, __func__)) return failing_code

int cuGetErrorName(int code, const char **text) { *text = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : 0; return code == 1 ? 0 : 1; }
int cuGetErrorString(int code, const char **text) { *text = code == 1 ? "invalid argument" : 0; return code == 1 ? 0 : 1; }
int cuDeviceGet(int *device, int ordinal) { MAY_FAIL; *device = 10 + ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) {
    MAY_FAIL; LOG("retain %d\n", device); *context = (void *)(uintptr_t)(0x7000000000 + device); return 0;
}
int cuCtxGetCurrent(void **context) { MAY_FAIL; *context = (void *)current; return 0; }
int cuCtxSetCurrent(void *context) { MAY_FAIL; current = (uintptr_t)context; LOG("context %lx\n", current); return 0; }
int cuModuleLoadData(void **module, const char *image) {
    MAY_FAIL; LOG("load %.8s\n", image); *module = (void *)(uintptr_t)(0x5000000000 + next_handle++); return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    MAY_FAIL; LOG("function %lx %s\n", (uintptr_t)module, name); *function = (void *)((uintptr_t)module + 0x1000000000); return 0;
}
int cuFuncSetCacheConfig(void *function, int config) { MAY_FAIL; LOG("cache %lx %d\n", (uintptr_t)function, config); return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) {
    MAY_FAIL; LOG("attribute %lx %d %d\n", (uintptr_t)function, attribute, value); return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    MAY_FAIL;
    LOG("launch %lx grid %u %u %u block %u %u %u shared %u stream %lx extra %p :", (uintptr_t)function, gx, gy, gz,
        bx, by, bz, shared, (uintptr_t)stream, (void *)extra);
    for (int i = 0; layout[i]; i++) {
        void *at = parameters[i];
        if (layout[i] == 'p') LOG(" %lu", *(uint64_t *)at);
        if (layout[i] == 'i') LOG(" %d", *(int32_t *)at);
        if (layout[i] == 'l') LOG(" %ld", *(int64_t *)at);
        if (layout[i] == 'f') LOG(" %.9g", *(float *)at);
    }
    LOG("\n");
    return 0;
}
