#include "teacher/read_probe.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/io.h"
#include "core/log.h"
#include "core/mem.h"
#include "teacher/feed.h"

enum { LEAST_FILE = 64 << 20, PAGE = 4096, MAX_THREADS = 16 };

/* Chunks one behind the other, file after file, handed out to all threads. */
struct course {
    const struct rt_tensors *ts;
    int *fd, n_files;      /* with O_DIRECT where that works */
    uint64_t *size;        /* usable bytes; 0: too small a file */
    int file;
    uint64_t at, read;
    double until, last;    /* when no new chunk is begun but the first; when the last one was there */
    bool begun, failed;
    pthread_mutex_t lock;
};

/* The next chunk; false: the time is over, or the files are. */
static bool next_chunk(struct course *c, int *file, uint64_t *offset)
{
    bool found = false;
    pthread_mutex_lock(&c->lock);
    const bool time = !c->begun || rt_now() < c->until; /* a machine may be too busy to begin in time */
    for (int tried = 0; !found && tried <= c->n_files && time && !c->failed; tried++) {
        found = c->at + RT_FEED_CHUNK <= c->size[c->file];
        if (!found) {
            c->file = (c->file + 1) % c->n_files;
            c->at = 0;
        }
    }
    c->begun |= found;
    *file = c->file;
    *offset = c->at;
    c->at += RT_FEED_CHUNK;
    pthread_mutex_unlock(&c->lock);
    return found;
}

static void *read_chunks(void *self)
{
    struct course *c = self;
    void *buf = NULL;
    int file;
    uint64_t offset;
    const bool room = posix_memalign(&buf, PAGE, RT_FEED_CHUNK) == 0;
    while (room && next_chunk(c, &file, &offset)) {
        size_t done = 0;
        ssize_t got = 1;
        while (got > 0 && done < RT_FEED_CHUNK) {
            got = pread(c->fd[file], (char *)buf + done, RT_FEED_CHUNK - done, (off_t)(offset + done));
            if (got < 0 && errno == EINTR)
                got = 1;
            else if (got > 0)
                done += (size_t)got;
        }
        pthread_mutex_lock(&c->lock);
        c->failed |= done < RT_FEED_CHUNK;
        c->read += done;
        c->last = rt_now();
        pthread_mutex_unlock(&c->lock);
    }
    free(buf);
    return NULL;
}

static enum rt_status open_course(const struct rt_tensors *ts, struct course *c, struct rt_err *err)
{
    enum rt_status st;
    c->ts = ts;
    c->n_files = rt_tensors_n_files(ts);
    RT_TRY(rt_alloc((size_t)c->n_files, sizeof *c->fd, "file table", &c->fd, err));
    RT_TRY(rt_alloc((size_t)c->n_files, sizeof *c->size, "file table", &c->size, err));
    for (int i = 0; i < c->n_files; i++) {
        struct stat sb;
        c->fd[i] = open(rt_tensors_file(ts, i), O_RDONLY | O_CLOEXEC | O_DIRECT);
        if (c->fd[i] < 0)
            c->fd[i] = open(rt_tensors_file(ts, i), O_RDONLY | O_CLOEXEC);
        if (c->fd[i] >= 0 && fstat(c->fd[i], &sb) == 0 && sb.st_size >= LEAST_FILE)
            c->size[i] = (uint64_t)sb.st_size / RT_FEED_CHUNK * RT_FEED_CHUNK;
    }
out:
    return st;
}

static void close_course(struct course *c)
{
    for (int i = 0; c->fd != NULL && i < c->n_files; i++)
        rt_file_close(c->fd[i]);
    rt_free(c->fd);
    rt_free(c->size);
}

static double run_course(struct course *c, int threads, double seconds)
{
    pthread_t thread[MAX_THREADS];
    int n = 0;
    const double t0 = rt_now();
    c->read = 0;
    c->begun = false;
    c->until = t0 + seconds;
    for (; n < threads; n++)
        if (pthread_create(&thread[n], NULL, read_chunks, c) != 0)
            break;
    for (int i = 0; i < n; i++)
        pthread_join(thread[i], NULL);
    return c->read > 0 && c->last > t0 ? (double)c->read / (c->last - t0) : 0;
}

enum rt_status rt_read_probe(const struct rt_tensors *ts, int least, int most, double seconds, struct rt_read_probe *out, struct rt_err *err)
{
    struct course c = {0};
    const int last = most < MAX_THREADS ? most : MAX_THREADS, first = least < last ? least : last;
    double greatest = 0;
    enum rt_status st;
    *out = (struct rt_read_probe){.best = -1};
    pthread_mutex_init(&c.lock, NULL);
    RT_TRY(open_course(ts, &c, err));
    uint64_t usable = 0;
    for (int i = 0; i < c.n_files; i++)
        usable += c.size[i];
    for (int threads = first; usable > 0 && !c.failed && threads <= last && out->n < RT_READ_COUNTS; threads *= 2) {
        /* away from what the one before read */
        c.file = (int)((int64_t)c.n_files * out->n / RT_READ_COUNTS) % c.n_files;
        c.at = c.n_files >= RT_READ_COUNTS ? 0 : c.size[c.file] / RT_READ_COUNTS * (uint64_t)out->n / RT_FEED_CHUNK * RT_FEED_CHUNK;
        out->readers[out->n] = threads;
        out->rate[out->n] = run_course(&c, threads, seconds);
        greatest = out->rate[out->n] > greatest ? out->rate[out->n] : greatest;
        out->n++;
    }
    if (c.failed || usable == 0)
        out->n = 0;
    for (int i = out->n - 1; i >= 0; i--)
        if (out->rate[i] >= greatest * 0.95)
            out->best = i;
out:
    close_course(&c);
    pthread_mutex_destroy(&c.lock);
    return st;
}
