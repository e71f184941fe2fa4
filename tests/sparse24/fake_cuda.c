/* A stand-in for libcuda.so.1: it records what it is called with. The structures are those of cuda.h. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    unsigned id;
    char pad[4];
    union {
        char size[64];
        struct { unsigned x, y, z; } cluster;
    } value;
} Attribute; /* CUlaunchAttribute */

typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void *stream;
    Attribute *attributes;
    unsigned count;
} Config; /* CUlaunchConfig */

typedef struct { /* what "encoding" a tensor map writes: its arguments, 128 bytes */
    uint64_t address, shape[2], stride;
    uint32_t element, rank, box[2], step[2], interleave, swizzle, promotion, fill, mark;
    char rest[128 - 32 - 44];
} Map;

int fail_code = 0;           /* returned by the function named fail_name */
char fail_name[64] = "";
char calls[4096] = "";       /* names of the functions called, separated by blanks */
int sizes[64], size_count = 0; /* of the parameters that the next launch has */
unsigned launch[10];         /* grid, block, shared, attributes, cluster x, and y * z */
uint64_t launch_stream, launch_function;
unsigned char parameters[4096];
int max_shared = 0, unaligned = 0;
char image[4], symbol[128];
uint64_t current = 0, pushed = 0;

static int called(const char *name) {
    if (strlen(calls) + strlen(name) + 2 < sizeof calls) strcat(strcat(calls, name), " ");
    return strcmp(name, fail_name) ? 0 : fail_code;
}
#define CALLED() do { int code = called(__func__); if (code) return code; } while (0)

int cuInit(unsigned flags) { CALLED(); return flags; }
int cuGetErrorString(int code, const char **text) { *text = code == 999 ? NULL : "what went wrong"; return 0; }
int cuDeviceGet(int *device, int ordinal) { CALLED(); *device = 100 + ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALLED(); *value = attribute == 16 && device >= 100 ? 4 : -1; return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { CALLED(); *context = (void *)(uintptr_t)(7000 + device); return 0; }
int cuCtxGetCurrent(void **context) { CALLED(); *context = (void *)(uintptr_t)current; return 0; }
int cuCtxPushCurrent_v2(void *context) { CALLED(); pushed = current; current = (uintptr_t)context; return 0; }
int cuCtxPopCurrent_v2(void **context) { CALLED(); *context = (void *)(uintptr_t)current; current = pushed; return 0; }
int cuModuleLoadData(void **module, const void *code) { CALLED(); memcpy(image, code, 4); *module = (void *)0x11; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    CALLED();
    strncpy(symbol, name, sizeof symbol - 1);
    *function = (char *)module + 0x11;
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    CALLED();
    if (function != (void *)0x22 || attribute != 8) return 1;
    max_shared = value;
    return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    CALLED();
    *blocks = function == (void *)0x22 && threads % 32 == 0 ? 1 : -1;
    return 0;
}
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const Config *config) {
    CALLED();
    if (function != (void *)0x22 || config->count != 1 || config->attributes->id != 4 || !config->shared) return 1;
    *clusters = 12 / config->attributes->value.cluster.x - 1;
    return 0;
}
int cuTensorMapEncodeTiled(Map *map, int element, uint32_t rank, void *address, const uint64_t *shape, const uint64_t *strides,
                           const uint32_t *box, const uint32_t *step, int interleave, int swizzle, int promotion, int fill) {
    CALLED();
    if ((uintptr_t)map % 64 || rank != 2) return 1;
    memset(map, 0, sizeof *map);
    map->address = (uintptr_t)address;
    map->element = element, map->rank = rank, map->interleave = interleave;
    map->swizzle = swizzle, map->promotion = promotion, map->fill = fill, map->mark = 0x2424;
    for (int i = 0; i < 2; i++) map->shape[i] = shape[i], map->box[i] = box[i], map->step[i] = step[i];
    map->stride = strides[0];
    return 0;
}
int cuLaunchKernelEx(const Config *config, void *function, void **values, void **extra) {
    CALLED();
    unsigned char *to = parameters;
    if (extra) return 1;
    for (int i = 0; i < size_count; i++) {
        if (sizes[i] == 128 && (uintptr_t)values[i] % 64) unaligned++;
        memcpy(to, values[i], sizes[i]);
        to += sizes[i];
    }
    memcpy(launch, config, 7 * sizeof(unsigned));
    launch[7] = config->count;
    launch[8] = launch[9] = 0;
    if (config->count == 1 && config->attributes->id == 4) {
        launch[8] = config->attributes->value.cluster.x;
        launch[9] = config->attributes->value.cluster.y * config->attributes->value.cluster.z;
    }
    launch_stream = (uintptr_t)config->stream, launch_function = (uintptr_t)function;
    return 0;
}
