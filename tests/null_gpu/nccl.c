// NCCL between processes of one machine, each with a fake device.
//
// A collective call copies this rank's part to a file at once. The other ranks' parts are read when something waits for
// the collective's stream, so data read without waiting are old. Unlike on a device, a call first finishes the earlier
// work of its stream, except within a group. The last reader of a file removes it; the files are in TMPDIR. Without
// NULL_GPU_COMPUTE large parts are not copied.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <nccl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "queue.h"

enum { SMALL = 1 << 20, PATIENCE_SECONDS = 600 };

struct ncclComm {
    char folder[PATH_MAX / 2];
    int rank, ranks;
    unsigned long long collectives;       // number of calls
    unsigned long long *sent, *received;  // to and from each rank
};

// How parts become a result: concatenated or summed; all of each part or only this rank's slice.
enum kind { COPY, SLICE, REDUCE, REDUCE_SLICE };

// Header of a file; the values follow.
struct part {
    int readers;  // number of ranks that have not read it
    int kind, type, operation;
    size_t bytes;
    size_t held;  // bytes, or 0 where large ones are not copied
    char values[];
};

static const char *failure = "the GPU that runs nothing cannot do this between ranks";

static ncclResult_t refuse(const char *what) {
    failure = what;
    return ncclInvalidUsage;
}

const char *ncclGetErrorString(ncclResult_t result) { return result ? failure : "no error"; }
const char *ncclGetLastError(ncclComm_t comm) { return failure; }

static void die(const char *what, const char *path) {
    fprintf(stderr, "null GPU: %s %s: %s\n", what, path, strerror(errno));
    abort();
}

// Communicators

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int made;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(id, 0, sizeof *id);
    snprintf(
        id->internal, sizeof id->internal, "null-gpu-%d-%lld-%d", getpid(),
        now.tv_sec * 1000000000ll + now.tv_nsec, __sync_add_and_fetch(&made, 1)
    );
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
    const char *parent = getenv("TMPDIR");
    struct ncclComm *made = calloc(1, sizeof *made);
    snprintf(made->folder, sizeof made->folder, "%s/%s", parent && *parent ? parent : "/tmp", id.internal);
    made->rank = rank;
    made->ranks = ranks;
    made->sent = calloc(ranks, sizeof *made->sent);
    made->received = calloc(ranks, sizeof *made->received);
    *comm = made;
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
    return ncclCommInitRank(comm, ranks, id, rank);
}

ncclResult_t ncclCommInitRankScalable(
    ncclComm_t *comm, int ranks, int rank, int num_ids, ncclUniqueId *ids, ncclConfig_t *config
) {
    return ncclCommInitRank(comm, ranks, ids[0], rank);
}

ncclResult_t ncclCommInitAll(ncclComm_t *comm, int ranks, const int *devices) {
    return refuse("the GPU that runs nothing has one device in a process: start a process for each rank");
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *part, ncclConfig_t *config) {
    return refuse("the GPU that runs nothing splits no communicators: leave out device_id of init_process_group");
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
    *count = comm->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

// The communicator is never freed, because queued work may need it. The last rank removes the empty folder.
static ncclResult_t leave(ncclComm_t comm) {
    rmdir(comm->folder);
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) { return leave(comm); }
ncclResult_t ncclCommAbort(ncclComm_t comm) { return leave(comm); }

ncclResult_t ncclMemAlloc(void **pointer, size_t bytes) {
    return cudaMalloc(pointer, bytes) ? ncclUnhandledCudaError : ncclSuccess;
}

ncclResult_t ncclMemFree(void *pointer) { return cudaFree(pointer) ? ncclUnhandledCudaError : ncclSuccess; }

// Values

static size_t size_of(ncclDataType_t type) {
    static const size_t sizes[ncclNumTypes] = {
        [ncclInt8] = 1, [ncclUint8] = 1, [ncclInt32] = 4, [ncclUint32] = 4, [ncclInt64] = 8, [ncclUint64] = 8,
        [ncclFloat16] = 2, [ncclFloat32] = 4, [ncclFloat64] = 8, [ncclBfloat16] = 2, [ncclFloat8e4m3] = 1,
        [ncclFloat8e5m2] = 1,
    };
    return sizes[type];
}

static bool is_integer(ncclDataType_t type) { return type <= ncclUint64; }
static bool can_reduce(ncclDataType_t type) {
    return (is_integer(type) && type != ncclUint64) || type == ncclFloat32 || type == ncclFloat64 || type == ncclBfloat16;
}

static float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// Ties round to even. Bits beyond float32 set its last bit, so that the result is rounded only once.
static uint16_t to_bfloat16(double value) {
    float near = (float)value;
    uint32_t wide;
    memcpy(&wide, &near, sizeof wide);
    if (value != value) return 0x7fc0;
    if (near != value) wide = (wide - (fabs(near) > fabs(value))) | 1;
    return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}

static double real_at(const void *values, size_t i, ncclDataType_t type) {
    return type == ncclFloat64   ? ((const double *)values)[i]
           : type == ncclFloat32 ? ((const float *)values)[i]
                                 : from_bfloat16(((const uint16_t *)values)[i]);
}

static void set_real(void *values, size_t i, ncclDataType_t type, double value) {
    if (type == ncclFloat64) ((double *)values)[i] = value;
    else if (type == ncclFloat32) ((float *)values)[i] = (float)value;
    else ((uint16_t *)values)[i] = to_bfloat16(value);
}

static int64_t integer_at(const void *values, size_t i, ncclDataType_t type) {
    switch (type) {
    case ncclInt8: return ((const int8_t *)values)[i];
    case ncclUint8: return ((const uint8_t *)values)[i];
    case ncclInt32: return ((const int32_t *)values)[i];
    case ncclUint32: return ((const uint32_t *)values)[i];
    default: return ((const int64_t *)values)[i];
    }
}

// Integers are little-endian.
static void set_integer(void *values, size_t i, ncclDataType_t type, int64_t value) {
    memcpy((char *)values + i * size_of(type), &value, size_of(type));
}

#define COMBINE(a, b, operation)                        \
    ((operation) == ncclProd  ? (a) * (b)               \
     : (operation) == ncclMax ? ((a) > (b) ? (a) : (b)) \
     : (operation) == ncclMin ? ((a) < (b) ? (a) : (b)) \
                              : (a) + (b))

// Floats are summed in float64 in rank order and rounded once, so every rank gets the same sum. NaN stays NaN.
static void reduce(
    void *to, const void *const *from, int ranks, size_t count, ncclDataType_t type, ncclRedOp_t operation
) {
    for (size_t i = 0; i < count; i++) {
        if (is_integer(type)) {
            int64_t total = integer_at(from[0], i, type);
            for (int rank = 1; rank < ranks; rank++) {
                int64_t next = integer_at(from[rank], i, type);
                total = COMBINE(total, next, operation);
            }
            set_integer(to, i, type, operation == ncclAvg ? total / ranks : total);
            continue;
        }
        double total = real_at(from[0], i, type);
        for (int rank = 1; rank < ranks; rank++) {
            double next = real_at(from[rank], i, type);
            total = next != next ? next : total != total ? total : COMBINE(total, next, operation);
        }
        set_real(to, i, type, operation == ncclAvg ? total / ranks : total);
    }
}

// Parts in files

static void path_of(char *path, const struct ncclComm *comm, const char *kind, unsigned long long number, int rank) {
    snprintf(path, PATH_MAX, "%s/%s-%llu-%d", comm->folder, kind, number, rank);
}

static void give(const struct ncclComm *comm, const char *path, const void *values, struct part head) {
    size_t bytes = head.held = head.bytes;
    char unfinished[PATH_MAX + 8];
    if (bytes > SMALL && !is_set("NULL_GPU_COMPUTE")) bytes = head.held = 0;
    size_t size = sizeof(struct part) + bytes;
    snprintf(unfinished, sizeof unfinished, "%s.new", path);
    int file = -1;
    for (int tries = 0; file < 0 && tries < 3; tries++) {  // a rank that leaves may remove the folder
        if (mkdir(comm->folder, 0700) && errno != EEXIST) die("cannot make", comm->folder);
        file = open(unfinished, O_RDWR | O_CREAT | O_TRUNC, 0600);
    }
    if (file < 0 || (errno = posix_fallocate(file, 0, size))) die("cannot write", unfinished);
    struct part *part = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (part == MAP_FAILED) die("cannot map", unfinished);
    close(file);
    *part = head;
    memcpy(part->values, values, bytes);
    munmap(part, size);
    if (rename(unfinished, path)) die("cannot rename", unfinished);
}

static struct part *take(const char *path, size_t *size) {
    struct stat status;
    int file = open(path, O_RDWR);
    if (file < 0 || fstat(file, &status)) die("cannot read", path);
    *size = status.st_size;
    struct part *part = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (part == MAP_FAILED) die("cannot map", path);
    close(file);
    return part;
}

static void put_back(const char *path, struct part *part, size_t size) {
    bool last = __sync_sub_and_fetch(&part->readers, 1) == 0;
    munmap(part, size);
    if (last) unlink(path);
}

// Queued work: reading the parts.

struct work {
    enum kind kind;
    const struct ncclComm *comm;
    const char *name;             // of the files
    unsigned long long sequence;  // in their names
    int first, last;              // ranks whose parts are read
    void *to;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t operation;
    cudaStream_t stream;
    unsigned long long number;
    struct work *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct work *queue;
static unsigned long long last_number;

unsigned long long last_work(void) { return __atomic_load_n(&last_number, __ATOMIC_ACQUIRE); }

static bool is_ready(const struct work *work) {
    char path[PATH_MAX];
    for (int rank = work->first; rank <= work->last; rank++) {
        path_of(path, work->comm, work->name, work->sequence, rank);
        if (access(path, F_OK)) return false;
    }
    return true;
}

static void run(const struct work *work) {
    int sources = work->last - work->first + 1;
    bool sliced = work->kind == SLICE || work->kind == REDUCE_SLICE;
    size_t bytes = work->count * size_of(work->type), offset = sliced ? work->comm->rank * bytes : 0;
    char(*paths)[PATH_MAX] = malloc(sources * sizeof *paths);
    struct part **parts = malloc(sources * sizeof *parts);
    const void **values = malloc(sources * sizeof *values);
    size_t *sizes = malloc(sources * sizeof *sizes);
    for (int i = 0; i < sources; i++) {
        path_of(paths[i], work->comm, work->name, work->sequence, work->first + i);
        parts[i] = take(paths[i], &sizes[i]);
        values[i] = parts[i]->values + offset;
    }
    size_t wanted = sliced ? bytes * work->comm->ranks : bytes;
    for (int i = 0; i < sources; i++) {
        const struct part *part = parts[i];
        bool same = part->kind == (int)work->kind && part->type == (int)work->type;
        if (same && part->operation == (int)work->operation && part->bytes == wanted) continue;
        fprintf(
            stderr, "null GPU: rank %d takes part in %s %llu of %s with %zu bytes of type %d, rank %d with %zu of %d, or "
            "in another way\n", work->comm->rank, work->name, work->sequence, work->comm->folder, wanted, work->type,
            work->first + i, part->bytes, part->type
        );
        abort();
    }
    if (!parts[0]->held) {
        // Large, and nothing is computed from it.
    } else if (work->kind == REDUCE || work->kind == REDUCE_SLICE) {
        reduce(work->to, values, sources, work->count, work->type, work->operation);
    } else {
        for (int i = 0; i < sources; i++) memcpy((char *)work->to + i * bytes, values[i], bytes);
    }
    for (int i = 0; i < sources; i++) put_back(paths[i], parts[i], sizes[i]);
    free(paths), free(parts), free(values), free(sizes);
}

// Whether a stream's work up to ``number`` is done. Does no work itself: torch queries from its own threads.
bool is_done(cudaStream_t stream, unsigned long long number) {
    if (!__atomic_load_n(&queue, __ATOMIC_ACQUIRE)) return true;
    pthread_mutex_lock(&lock);
    bool done = true;
    for (struct work *work = queue; work; work = work->next)
        if (work->stream == stream && work->number <= number) done = false;
    pthread_mutex_unlock(&lock);
    return done;
}

// Run a stream's ready work in order; whether all up to ``number`` is done.
static bool advance(cudaStream_t stream, unsigned long long number) {
    bool done = true;
    if (!__atomic_load_n(&queue, __ATOMIC_ACQUIRE)) return true;
    pthread_mutex_lock(&lock);
    for (struct work **link = &queue; *link && done;) {
        struct work *work = *link;
        if (work->stream != stream || work->number > number) {
            link = &work->next;
        } else if (is_ready(work)) {
            run(work);
            *link = work->next;
            free(work);
        } else {
            done = false;
        }
    }
    pthread_mutex_unlock(&lock);
    return done;
}

void finish(cudaStream_t stream, unsigned long long number) {
    struct timespec begin, now, pause = {.tv_nsec = 50000};
    clock_gettime(CLOCK_MONOTONIC, &begin);
    while (!advance(stream, number)) {
        nanosleep(&pause, NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec - begin.tv_sec > PATIENCE_SECONDS) {
            pthread_mutex_lock(&lock);
            const struct work *work = queue;
            while (work && work->stream != stream) work = work->next;
            if (work)
                fprintf(
                    stderr, "null GPU: rank %d of %d has waited for %d s for the others in %s %llu of %s\n",
                    work->comm->rank, work->comm->ranks, PATIENCE_SECONDS, work->name, work->sequence, work->comm->folder
                );
            abort();
        }
    }
}

void finish_all(void) {
    for (;;) {
        pthread_mutex_lock(&lock);
        bool empty = !queue;
        cudaStream_t stream = empty ? NULL : queue->stream;
        pthread_mutex_unlock(&lock);
        if (empty) return;
        finish(stream, ULLONG_MAX);
    }
}

static ncclResult_t add(struct work work) {
    struct work *added = malloc(sizeof *added);
    *added = work;
    pthread_mutex_lock(&lock);
    added->number = __atomic_add_fetch(&last_number, 1, __ATOMIC_ACQ_REL);
    struct work **link = &queue;
    while (*link) link = &(*link)->next;
    __atomic_store_n(link, added, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    return ncclSuccess;
}

// Calls between these two do not depend on each other.

static _Thread_local int groups;
static _Thread_local unsigned long long last_before_group;

ncclResult_t ncclGroupStart(void) {
    if (!groups++) last_before_group = last_work();
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
    if (!groups) return refuse("ncclGroupEnd without ncclGroupStart");
    groups--;
    return ncclSuccess;
}

// The values to send may depend on earlier work of the stream.
static void finish_before(cudaStream_t stream) { finish(stream, groups ? last_before_group : ULLONG_MAX); }

// Collectives. ``gives`` and ``takes``: the rank that sends or receives, or -1 for all.

static ncclResult_t collective(
    enum kind kind, const void *from, size_t given, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation,
    int gives, int takes, ncclComm_t comm, cudaStream_t stream
) {
    finish_before(stream);
    size_t bytes = given * size_of(type);
    if (comm->ranks == 1) {
        if (from != to) cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
        return ncclSuccess;
    }
    if (kind == REDUCE || kind == REDUCE_SLICE) {
        if (operation >= ncclNumOps) return refuse("the GPU that runs nothing has no factors in reductions");
        if (!can_reduce(type)) return refuse("the GPU that runs nothing reduces no float16, float8 and uint64");
    }
    pthread_mutex_lock(&lock);
    unsigned long long sequence = comm->collectives++;
    pthread_mutex_unlock(&lock);
    if (gives < 0 || gives == comm->rank) {
        char path[PATH_MAX];
        path_of(path, comm, "collective", sequence, comm->rank);
        give(comm, path, from, (struct part){takes < 0 ? comm->ranks : 1, kind, type, operation, bytes});
    }
    if (takes >= 0 && takes != comm->rank) return ncclSuccess;
    return add((struct work){
        .kind = kind, .comm = comm, .name = "collective", .sequence = sequence, .first = gives < 0 ? 0 : gives,
        .last = gives < 0 ? comm->ranks - 1 : gives, .to = to, .count = count, .type = type, .operation = operation,
        .stream = stream,
    });
}

ncclResult_t ncclAllReduce(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t comm,
    cudaStream_t stream
) {
    return collective(REDUCE, from, count, to, count, type, operation, -1, -1, comm, stream);
}

ncclResult_t ncclReduce(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, int root, ncclComm_t comm,
    cudaStream_t stream
) {
    return collective(REDUCE, from, count, to, count, type, operation, -1, root, comm, stream);
}

ncclResult_t ncclReduceScatter(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t comm,
    cudaStream_t stream
) {
    return collective(REDUCE_SLICE, from, count * comm->ranks, to, count, type, operation, -1, -1, comm, stream);
}

ncclResult_t ncclAllGather(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream
) {
    return collective(COPY, from, count, to, count, type, ncclSum, -1, -1, comm, stream);
}

ncclResult_t ncclAlltoAll(
    const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream
) {
    return collective(SLICE, from, count * comm->ranks, to, count, type, ncclSum, -1, -1, comm, stream);
}

ncclResult_t ncclBroadcast(
    const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream
) {
    return collective(COPY, from, count, to, count, type, ncclSum, root, -1, comm, stream);
}

ncclResult_t ncclBcast(
    void *values, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream
) {
    return ncclBroadcast(values, values, count, type, root, comm, stream);
}

ncclResult_t ncclRedOpCreatePreMulSum(
    ncclRedOp_t *operation, void *factor, ncclDataType_t type, ncclScalarResidence_t residence, ncclComm_t comm
) {
    return refuse("the GPU that runs nothing has no factors in reductions");
}

// From one rank to another

static const char *const FROM_TO = "from-to";

// One name per pair; the other rank's number is part of ``sequence``.
static unsigned long long pair_sequence(unsigned long long count, int to, int ranks) { return count * ranks + to; }

ncclResult_t ncclSend(
    const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream
) {
    char path[PATH_MAX];
    finish_before(stream);
    pthread_mutex_lock(&lock);
    unsigned long long sent = comm->sent[peer]++;
    pthread_mutex_unlock(&lock);
    path_of(path, comm, FROM_TO, pair_sequence(sent, peer, comm->ranks), comm->rank);
    give(comm, path, from, (struct part){1, COPY, type, ncclSum, count * size_of(type)});
    return ncclSuccess;
}

ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    pthread_mutex_lock(&lock);
    unsigned long long received = comm->received[peer]++;
    pthread_mutex_unlock(&lock);
    return add((struct work){
        .kind = COPY, .comm = comm, .name = FROM_TO,
        .sequence = pair_sequence(received, comm->rank, comm->ranks), .first = peer, .last = peer, .to = to,
        .count = count, .type = type, .stream = stream,
    });
}
