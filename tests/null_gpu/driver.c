// Fake CUDA devices: all calls of torch, Triton, Transformer Engine, cuBLAS and cuDNN succeed, memory is reserved and
// counted, copies are made, and kernels do nothing. run.py builds this file together with nccl.c and empty functions
// for every other symbol that the installed libraries need.
//
// Environment:
//   NULL_GPU_DEVICES  number of devices; default 1
//   NULL_GPU_GIB      memory of each in GiB; default 79.1, as an H100
//   NULL_GPU_COMPUTE  1: make every copy. Otherwise large device copies and zeros use no host memory
//   NULL_GPU_TRACE    1: print the names of called empty functions to standard error
#define _GNU_SOURCE
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cudnn.h>
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "queue.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

bool is_set(const char *name) {
    const char *value = getenv(name);
    return value && atoi(value);
}

// Opaque handles differ and are never read.
static void *new_handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__sync_add_and_fetch(&last, 16);
}

// Errors: cudaGetLastError returns that of a launch later.

static _Thread_local cudaError_t last_error;

static cudaError_t fail(cudaError_t error) { return last_error = error; }

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument: no GPU can launch this grid";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    default: return "not supported by the GPU that runs nothing";
    }
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == CUDA_SUCCESS ? "CUDA_SUCCESS" : "CUDA_ERROR";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString((cudaError_t)error);  // the numbers are the same
    return CUDA_SUCCESS;
}

int null_gpu_generated(const char *name) {
    if (is_set("NULL_GPU_TRACE")) fprintf(stderr, "null GPU: %s\n", name);
    return 0;
}

// Devices: each thread has a current one.

enum { MOST_DEVICES = 64 };
static _Thread_local int current_device;

static int num_devices(void) {
    const char *number = getenv("NULL_GPU_DEVICES");
    int devices = number ? atoi(number) : 1;
    return devices < MOST_DEVICES ? devices : MOST_DEVICES;
}

// The devices in CUDA_VISIBLE_DEVICES up to the first that does not exist.
cudaError_t cudaGetDeviceCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = visible ? 0 : num_devices();
    while (visible && *visible) {
        char *end;
        long device = strtol(visible, &end, 10);
        if (end == visible || device < 0 || device >= num_devices()) break;
        ++*count;
        visible = *end == ',' ? end + 1 : "";
    }
    return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}

CUresult cuDeviceGetCount(int *count) { return (CUresult)cudaGetDeviceCount(count); }

cudaError_t cudaSetDevice(int device) {
    int count;
    if (cudaGetDeviceCount(&count) || device < 0 || device >= count) return fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) { return (CUresult)cudaGetDevice(device); }

// Memory: device blocks, which are counted, and pinned host blocks.

enum { MOST_BLOCKS = 1 << 16, SMALL = 1 << 20 };

static struct block {
    uintptr_t begin;
    size_t size;
    enum cudaMemoryType type;
    int device;
    size_t counted;  // of the device's memory
} blocks[MOST_BLOCKS];
static int num_blocks;
static size_t used[MOST_DEVICES];

static size_t device_bytes(void) {
    const char *gib = getenv("NULL_GPU_GIB");
    return (size_t)((gib ? atof(gib) : 79.1) * (1ull << 30));
}

static struct block block_of(const void *pointer) {
    struct block found = {.type = cudaMemoryTypeUnregistered, .device = current_device};
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_blocks; i++)
        if ((uintptr_t)pointer - blocks[i].begin < blocks[i].size) found = blocks[i];
    pthread_mutex_unlock(&lock);
    return found;
}

static enum cudaMemoryType type_of(const void *pointer) { return block_of(pointer).type; }

static bool add_block(void *pointer, size_t size, enum cudaMemoryType type, size_t counted) {
    pthread_mutex_lock(&lock);
    bool fits = num_blocks < MOST_BLOCKS;
    if (fits) blocks[num_blocks++] = (struct block){(uintptr_t)pointer, size, type, current_device, counted};
    pthread_mutex_unlock(&lock);
    return fits;
}

// Size of the block that started at ``pointer``, or 0.
static size_t remove_block(const void *pointer) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_blocks; i++)
        if (blocks[i].begin == (uintptr_t)pointer) {
            size = blocks[i].size;
            used[blocks[i].device] -= blocks[i].counted;
            blocks[i] = blocks[--num_blocks];
            break;
        }
    pthread_mutex_unlock(&lock);
    return size;
}

// Take memory from the device; whether it had enough left.
static bool take(int device, size_t size) {
    pthread_mutex_lock(&lock);
    size_t *taken = &used[device];
    bool fits = size <= device_bytes() - *taken && *taken <= device_bytes();
    if (fits) *taken += size;
    pthread_mutex_unlock(&lock);
    return fits;
}

static void give_back(int device, size_t size) {
    pthread_mutex_lock(&lock);
    used[device] -= size;
    pthread_mutex_unlock(&lock);
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    size_t size = (bytes + 511) & ~(size_t)511;
    *pointer = NULL;
    if (!size) return cudaSuccess;
    if (!take(current_device, size)) return fail(cudaErrorMemoryAllocation);
    void *block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED || !add_block(block, size, cudaMemoryTypeDevice, size)) {
        fprintf(stderr, "null GPU: the host cannot reserve %zu bytes more\n", size);
        abort();
    }
    *pointer = block;
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
    finish_all();  // which may still write there
    size_t size = pointer ? remove_block(pointer) : 0;
    if (size) munmap(pointer, size);
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned int flags) {
    if (posix_memalign(pointer, 4096, bytes ? bytes : 1)) return fail(cudaErrorMemoryAllocation);
    add_block(*pointer, bytes, cudaMemoryTypeHost, 0);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }

cudaError_t cudaFreeHost(void *pointer) {
    remove_block(pointer);
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned int flags) {
    add_block(pointer, bytes, cudaMemoryTypeHost, 0);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer) {
    remove_block(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = device_bytes();
    *unused = *total - used[current_device];
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    struct block block = block_of(pointer);
    enum cudaMemoryType type = block.type;
    *attributes = (struct cudaPointerAttributes){.type = type, .device = block.device};
    attributes->devicePointer = type == cudaMemoryTypeUnregistered ? NULL : (void *)pointer;
    attributes->hostPointer = type == cudaMemoryTypeDevice ? NULL : (void *)pointer;
    return cudaSuccess;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    struct block block = block_of((void *)pointer);
    enum cudaMemoryType type = block.type;
    if (type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = pointer;
    else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(CUmemorytype *)value = (CUmemorytype)type;
    else *(int *)value = attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL ? block.device : 0;
    return CUDA_SUCCESS;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    finish(stream, ULLONG_MAX);
    bool inside = type_of(to) == cudaMemoryTypeDevice && type_of(from) == cudaMemoryTypeDevice;
    if (bytes && (bytes <= SMALL || !inside || is_set("NULL_GPU_COMPUTE"))) memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(
    void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream
) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
    enum cudaMemcpyKind kind, cudaStream_t stream
) {
    finish(stream, ULLONG_MAX);
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

// Large ranges of zeros are returned to the host, which reads them as zeros.
cudaError_t cudaMemset(void *pointer, int value, size_t bytes) {
    if (value || bytes <= SMALL || is_set("NULL_GPU_COMPUTE")) {
        memset(pointer, value, bytes);
        return cudaSuccess;
    }
    uintptr_t begin = (uintptr_t)pointer, end = begin + bytes;
    uintptr_t first = (begin + 4095) & ~(uintptr_t)4095, last = end & ~(uintptr_t)4095;
    memset(pointer, 0, first - begin);
    memset((void *)last, 0, end - last);
    madvise((void *)first, last - first, MADV_DONTNEED);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
    finish(stream, ULLONG_MAX);
    return cudaMemset(pointer, value, bytes);
}

// Addresses of variables in device code: memory that nothing reads.
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    static char space[SMALL];
    *pointer = space;
    return cudaSuccess;
}

// Virtual addresses and the memory mapped to them: torch's expandable segments.

CUresult cuMemAddressReserve(
    CUdeviceptr *pointer, size_t size, size_t alignment, CUdeviceptr wanted, unsigned long long flags
) {
    void *range = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED || !add_block(range, size, cudaMemoryTypeDevice, 0)) return CUDA_ERROR_OUT_OF_MEMORY;
    *pointer = (CUdeviceptr)range;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
    remove_block((void *)pointer);
    munmap((void *)pointer, size);
    return CUDA_SUCCESS;
}

struct memory {
    size_t size;
    int device;
};

CUresult cuMemCreate(
    CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties, unsigned long long flags
) {
    struct memory *memory = malloc(sizeof *memory);
    *memory = (struct memory){size, properties->location.id};
    if (!take(memory->device, size)) {
        free(memory);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle = (CUmemGenericAllocationHandle)memory;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    struct memory *memory = (struct memory *)handle;
    give_back(memory->device, memory->size);
    free(memory);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(
    CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags
) {
    return mprotect((void *)pointer, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    finish_all();  // which may still write there
    madvise((void *)pointer, size, MADV_DONTNEED);
    return mprotect((void *)pointer, size, PROT_NONE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

// Multicast and memory of other processes are not supported.
CUresult cuMulticastCreate(CUmemGenericAllocationHandle *handle, const CUmulticastObjectProp *properties) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) { return fail(cudaErrorNotSupported); }

cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned int flags) {
    return fail(cudaErrorNotSupported);
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    *(uint64_t *)value = 0;
    return cudaSuccess;
}

// Graph capture, one at a time. A call that makes the host wait breaks it, as on a device.

static struct {
    bool active, broken;
    cudaStream_t stream;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    unsigned long long number;
} capture;
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static int a_graph;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (!stream || capture.active) return fail(cudaErrorStreamCaptureUnsupported);
    capture.active = true;
    capture.broken = false;
    capture.stream = stream;
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.number++;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = capture.broken ? NULL : (cudaGraph_t)&a_graph;
    capture.active = false;
    return capture.broken ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capture.active && stream == capture.stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *num_dependencies
) {
    if (number) *number = capture.number;
    if (graph) *graph = (cudaGraph_t)&a_graph;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (num_dependencies) *num_dependencies = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

static cudaError_t wait_of_host(cudaStream_t stream) {
    if (!capture.active) return cudaSuccess;
    bool relaxed = capture.mode == cudaStreamCaptureModeRelaxed || thread_mode == cudaStreamCaptureModeRelaxed;
    bool concerned = capture.mode == cudaStreamCaptureModeGlobal || pthread_equal(capture.thread, pthread_self());
    if (stream != capture.stream && (relaxed || !concerned)) return cudaSuccess;
    capture.broken = true;
    return fail(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = 1;  // 0 would count as an error
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(
    cudaGraphNode_t node, cudaGraphNode_t *dependencies, cudaGraphEdgeData *edges, size_t *count
) {
    *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = new_handle();
    return cudaSuccess;
}

// A graph's kernels do nothing. Its collectives are not repeated.
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    finish(stream, ULLONG_MAX);
    return cudaSuccess;
}

// Streams and events: work is done at once, except work that involves other ranks (queue.h).

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned int flags, int priority) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

// For kernels.py, which computes without a launch.
void null_gpu_finish(cudaStream_t stream) { finish(stream, ULLONG_MAX); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    finish(stream, ULLONG_MAX);
    return wait_of_host(stream);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return is_done(stream, ULLONG_MAX) ? cudaSuccess : fail(cudaErrorNotReady);
}

cudaError_t cudaDeviceSynchronize(void) {
    finish_all();
    return wait_of_host(NULL);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = wait_of_host(NULL);
    return error ? error : cudaMemcpyAsync(to, from, bytes, kind, NULL);
}

// The work of a stream up to an event.
struct CUevent_st {
    cudaStream_t stream;
    unsigned long long number;  // of the last work before it
};

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *event = (struct CUevent_st){stream, last_work()};
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    return is_done(event->stream, event->number) ? cudaSuccess : fail(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    finish(event->stream, event->number);
    return wait_of_host(NULL);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
    finish(event->stream, event->number);
    // The legacy stream waits for all others, which is forbidden in a capture.
    bool concerned = capture.active && pthread_equal(capture.thread, pthread_self());
    return concerned && !stream ? wait_of_host(NULL) : cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    finish(stream, ULLONG_MAX);
    if (!capture.active || stream != capture.stream) function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned int flags) {
    finish(stream, ULLONG_MAX);
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) { return cuCtxGetCurrent(context); }

// Launches: the kernel does nothing, but earlier work of the stream is done; an impossible grid is an error.

enum { MOST_THREADS = 1024, MOST_SHARED = 232448, MOST_THREADS_OF_SM = 2048 };

static cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    finish(stream, ULLONG_MAX);
    bool empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
    bool large = grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535 || block.z > 64 || shared > MOST_SHARED;
    if (empty || large || (size_t)block.x * block.y * block.z > MOST_THREADS)
        return fail(cudaErrorInvalidConfiguration);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(
    const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream
) {
    return launch(grid, block, shared, stream);
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream
) {
    return launch(grid, block, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(
    const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream
) {
    return launch(grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

CUresult cuLaunchKernel(
    CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
    unsigned int block_y, unsigned int block_z, unsigned int shared, CUstream stream, void **arguments, void **extra
) {
    return (CUresult)launch((dim3){grid_x, grid_y, grid_z}, (dim3){block_x, block_y, block_z}, shared, stream);
}

CUresult cuLaunchCooperativeKernel(
    CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
    unsigned int block_y, unsigned int block_z, unsigned int shared, CUstream stream, void **arguments
) {
    return (CUresult)launch((dim3){grid_x, grid_y, grid_z}, (dim3){block_x, block_y, block_z}, shared, stream);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    return cuLaunchKernel(
        function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
        config->blockDimZ, config->sharedMemBytes, config->hStream, arguments, extra
    );
}

// The compiler turns <<<...>>> into a push and, in the kernel's stub, a pop; arguments in between may launch kernels.
enum { MOST_PUSHED = 16 };
static _Thread_local struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} pushed[MOST_PUSHED];
static _Thread_local int num_pushed;

unsigned int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    if (num_pushed == MOST_PUSHED) {
        fprintf(stderr, "null GPU: more than %d launches within each other\n", MOST_PUSHED);
        abort();
    }
    pushed[num_pushed].grid = grid;
    pushed[num_pushed].block = block;
    pushed[num_pushed].shared = shared;
    pushed[num_pushed++].stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed[--num_pushed].grid;
    *block = pushed[num_pushed].block;
    *shared = pushed[num_pushed].shared;
    *(cudaStream_t *)stream = pushed[num_pushed].stream;
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *registered;
    return &registered;
}

char __cudaInitModule(void **binary) { return 1; }

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = new_handle();
    return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadData(module, NULL); }

CUresult cuModuleLoadDataEx(
    CUmodule *module, const void *image, unsigned int count, CUjit_option *options, void **values
) {
    return cuModuleLoadData(module, image);
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = new_handle();
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MOST_THREADS
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                                  : 0;
    return CUDA_SUCCESS;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = MOST_THREADS, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 90,
        .maxDynamicSharedSizeBytes = MOST_SHARED,
    };
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int threads, size_t shared, unsigned int flags
) {
    *count = threads > 64 ? MOST_THREADS_OF_SM / threads : 32;
    return cudaSuccess;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads, size_t shared) {
    return (CUresult)cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, function, threads, shared, 0);
}

cudaError_t cudaOccupancyMaxActiveClusters(int *count, const void *function, const cudaLaunchConfig_t *config) {
    *count = 66;
    return cudaSuccess;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 66;
    return CUDA_SUCCESS;
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int *size, const void *function, const cudaLaunchConfig_t *config) {
    *size = 8;
    return cudaSuccess;
}

// The device: an H100's figures.

static int attribute_of(CUdevice_attribute attribute) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return MOST_THREADS;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return INT_MAX;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return MOST_SHARED;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 233472;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return MOST_THREADS_OF_SM;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED: return 0;
    default: return 1;
    }
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute_of(attribute);
    return CUDA_SUCCESS;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    return (cudaError_t)cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device);  // the numbers are the same
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .totalGlobalMem = device_bytes(), .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .warpSize = 32,
        .maxThreadsPerBlock = MOST_THREADS, .maxThreadsDim = {MOST_THREADS, MOST_THREADS, 64},
        .maxGridSize = {INT_MAX, 65535, 65535}, .totalConstMem = 65536, .major = 9, .minor = 0,
        .multiProcessorCount = 132, .textureAlignment = 512, .l2CacheSize = 50 << 20,
        .maxThreadsPerMultiProcessor = MOST_THREADS_OF_SM, .sharedMemPerMultiprocessor = 233472,
        .regsPerMultiprocessor = 65536, .sharedMemPerBlockOptin = MOST_SHARED, .unifiedAddressing = 1,
        .concurrentKernels = 1, .asyncEngineCount = 3, .memoryBusWidth = 5120, .canMapHostMemory = 1,
        .maxBlocksPerMultiProcessor = 32,
    };
    strcpy(properties->name, "GPU that runs nothing (sm_90)");
    return cudaSuccess;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)&blocks;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 1024;
    return CUDA_SUCCESS;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:%02x:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = new_handle();
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { return cudaRuntimeGetVersion(version); }
CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaRuntimeGetVersion(version); }

static int nothing(void) { return 0; }

// Names come without the version that cuda.h adds to them.
static void find(const char *name, void **function) {
    char versioned[256];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, versioned);
    if (!*function) *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = (void *)nothing;
}

CUresult cuGetProcAddress(
    const char *name, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *result
) {
    find(name, function);
    if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned int version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result
) {
    find(name, function);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// cuBLAS: products do nothing.

cublasStatus_t cublasCreate(cublasHandle_t *handle) {
    *handle = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusString(cublasStatus_t status) { return "status of a cuBLAS that runs nothing"; }
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(
    cublasLtMatmulDesc_t *descriptor, cublasComputeType_t compute, cudaDataType_t scale
) {
    *descriptor = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    *preference = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t columns, int64_t stride
) {
    *layout = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t descriptor, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int requested,
    cublasLtMatmulHeuristicResult_t *results, int *count
) {
    memset(results, 0, sizeof *results);
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

// cuDNN: no graph is supported.

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(cudnnStatus_t status) { return "status of a cuDNN that runs nothing"; }
void cudnnGetLastErrorString(char *text, size_t length) { snprintf(text, length, "%s", cudnnGetErrorString(0)); }

cudnnStatus_t cudnnGetProperty(libraryPropertyType type, int *value) {
    *value = type == MAJOR_VERSION ? CUDNN_MAJOR : type == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    *handle = new_handle();
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *descriptor) {
    *descriptor = new_handle();
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) { return CUDNN_STATUS_NOT_SUPPORTED; }
