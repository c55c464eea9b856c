#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/io.h"
#include "tests/suite.h"

/* The whole file, or "<none>"; static storage. */
static const char *content(const char *path)
{
    static char text[4096];
    FILE *f = fopen(path, "rb");
    if (f == NULL)
        return "<none>";
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return text;
}

static void reads_exactly(void **state)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    char got[8] = "";
    int fd;
    uint64_t size;
    const char *path = test_tmp("reads");
    (void)state;
    assert_ok(rt_publish_bytes(path, "0123456789", 10, &err));
    assert_ok(rt_file_open(path, &fd, &size, &err));
    assert_int_equal(size, 10);
    assert_ok(rt_file_pread(fd, path, got, 4, 6, &err));
    assert_string_equal(got, "6789");
    assert_ok(rt_file_pread(fd, path, got, 0, 10, &err));
    assert_int_equal(rt_file_pread(fd, path, got, 4, 7, &err), RT_FORMAT);
    assert_non_null(strstr(err.msg, "4 bytes expected at offset 7, 3 found"));
    assert_non_null(strstr(err.msg, path));
    rt_err_clear(&err);
    assert_status(rt_file_pread(fd, path, got, 4, UINT64_MAX - 1, &err), FORMAT);
    rt_file_close(fd);
    rt_file_close(-1);
    assert_ok(rt_buf_puts(&b, "head ", &err));
    assert_status(rt_file_read_all(path, 9, &b, &err), FORMAT);
    assert_int_equal(b.len, 5);
    assert_ok(rt_file_read_all(path, 10, &b, &err));
    assert_string_equal(b.data, "head 0123456789");
    assert_int_equal(b.len, 15);
    b.len = 0;
    assert_ok(rt_publish_bytes(path, "", 0, &err));
    assert_ok(rt_file_read_all(path, 0, &b, &err));
    assert_int_equal(b.len, 0);
    assert_string_equal(b.data, "");
    rt_buf_free(&b);
}

static void refuses_what_is_no_file(void **state)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    int fd = 7;
    uint64_t size;
    const char *fifo = test_tmp("fifo");
    (void)state;
    assert_int_equal(rt_file_open(test_tmp("missing"), &fd, &size, &err), RT_IO);
    assert_non_null(strstr(err.msg, "missing"));
    assert_non_null(strstr(err.msg, "No such file"));
    assert_int_equal(fd, -1);
    rt_err_clear(&err);
    assert_status(rt_file_open("/", &fd, &size, &err), IO);
    assert_status(rt_file_open("/dev/zero", &fd, &size, &err), IO);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_status(rt_file_read_all(fifo, 100, &b, &err), IO); /* and does not wait for a writer */
    assert_null(b.data);
}

static void file_without_a_size(void **state)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    (void)state;
    if (!rt_path_exists("/proc/self/status"))
        TEST_SKIP("no /proc");
    assert_ok(rt_file_read_all("/proc/self/status", 1 << 20, &b, &err));
    assert_true(b.len > 100);
    b.len = 0;
    assert_status(rt_file_read_all("/proc/self/status", 10, &b, &err), FORMAT);
    assert_int_equal(b.len, 0);
    rt_buf_free(&b);
}

static void publish_is_all_or_nothing(void **state)
{
    struct rt_err err = {0};
    struct rt_publish p;
    const char *path = test_tmp("published"), *tmp = test_tmp("published.tmp");
    (void)state;
    assert_ok(rt_publish_open(&p, path, &err));
    assert_ok(rt_publish_write(&p, "abc", 3, &err));
    assert_ok(rt_publish_write(&p, "def", 3, &err));
    assert_int_equal(p.written, 6);
    assert_string_equal(content(path), "<none>");
    assert_ok(rt_publish_commit(&p, &err));
    assert_string_equal(content(path), "abcdef");
    assert_false(rt_path_exists(tmp));
    rt_publish_abort(&p);
    assert_string_equal(content(path), "abcdef");
    assert_ok(rt_publish_open(&p, path, &err));
    assert_ok(rt_publish_write(&p, "xyz", 3, &err));
    rt_publish_abort(&p);
    assert_string_equal(content(path), "abcdef");
    assert_false(rt_path_exists(tmp));
    assert_ok(rt_publish_bytes(path, "new", 3, &err));
    assert_string_equal(content(path), "new");
}

static void publish_where_one_cannot_write(void **state)
{
    struct rt_err err = {0};
    struct rt_publish p;
    (void)state;
    const char *file = test_tmp("plain"), *under = test_tmp("plain/x"), *dir = test_tmp("taken/sub");
    assert_ok(rt_publish_bytes(file, "1", 1, &err));
    assert_status(rt_publish_open(&p, under, &err), IO); /* root passes permissions, but not this */
    assert_int_equal(p.fd, -1);
    rt_publish_abort(&p);
    assert_ok(rt_mkdirs(dir, &err));
    assert_status(rt_publish_bytes(test_tmp("taken"), "1", 1, &err), IO); /* a directory has the name */
    assert_false(rt_path_exists(test_tmp("taken.tmp")));
    assert_true(rt_path_is_dir(dir));
    char far[5000];
    memset(far, 'a', sizeof far - 1);
    far[sizeof far - 1] = '\0';
    assert_status(rt_publish_open(&p, far, &err), USAGE);
}

/* Runs in a child whose files may have 4096 bytes: what a full disk looks like. Bits of the exit status: checks passed. */
static int on_full_disk(const char *path, const char *log)
{
    static char data[10000];
    const struct rlimit limit = {4096, 4096};
    struct rt_err err = {0};
    int passed = 0;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    memset(data, 'x', sizeof data);
    passed |= rt_publish_bytes(path, data, sizeof data, &err) == RT_IO && strstr(err.msg, "cannot write") != NULL;
    rt_err_clear(&err);
    data[3000] = '\n';
    passed |= (rt_file_append_sync(log, data, 3001, &err) == RT_OK) << 1;
    passed |= (rt_file_append_sync(log, data, 3001, &err) == RT_IO) << 2;
    return passed;
}

static void full_disk_leaves_the_old(void **state)
{
    struct rt_err err = {0};
    struct stat sb;
    int status;
    const char *path = test_tmp("full"), *log = test_tmp("full.log");
    (void)state;
    assert_ok(rt_publish_bytes(path, "old", 3, &err));
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0)
        _exit(on_full_disk(path, log));
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 7);
    assert_string_equal(content(path), "old");
    assert_false(rt_path_exists(test_tmp("full.tmp")));
    assert_int_equal(stat(log, &sb), 0);
    assert_int_equal(sb.st_size, 3001); /* the part of the second record is cut off again */
}

static void append_mends_a_torn_line(void **state)
{
    struct rt_err err = {0};
    const char *path = test_tmp("manifest");
    static char lines[3000];
    (void)state;
    assert_ok(rt_file_append_sync(path, "one\n", 4, &err));
    assert_ok(rt_file_append_sync(path, "two\n", 4, &err));
    assert_string_equal(content(path), "one\ntwo\n");
    assert_ok(rt_file_append_sync(path, "{\"torn", 6, &err)); /* a record that is no line is left as it is */
    assert_string_equal(content(path), "one\ntwo\n{\"torn");
    assert_ok(rt_file_append_sync(path, "three\n", 6, &err));
    assert_string_equal(content(path), "one\ntwo\nthree\n");
    const char *torn = test_tmp("torn");
    memset(lines, 'a', sizeof lines);
    for (int i = 0; i < 3; i++) /* longer than the block that is searched */
        assert_ok(rt_file_append_sync(torn, lines, sizeof lines, &err));
    assert_ok(rt_file_append_sync(torn, "1\n", 2, &err));
    assert_string_equal(content(torn), "1\n");
    for (int i = 0; i < 3; i++)
        assert_ok(rt_file_append_sync(torn, lines, sizeof lines, &err));
    assert_ok(rt_file_append_sync(torn, "2\n", 2, &err));
    assert_string_equal(content(torn), "1\n2\n");
    assert_status(rt_file_append_sync("/dev/full", "1\n", 2, &err), IO);
    assert_status(rt_file_append_sync(test_tmp("nowhere/file"), "1\n", 2, &err), IO);
}

static void directories(void **state)
{
    struct rt_err err = {0};
    char **names;
    size_t n;
    uint64_t free_bytes;
    (void)state;
    assert_ok(rt_mkdirs(test_tmp("d/e//f/"), &err));
    assert_ok(rt_mkdirs(test_tmp("d/e/f"), &err));
    assert_true(rt_path_is_dir(test_tmp("d/e/f")));
    assert_ok(rt_publish_bytes(test_tmp("d/b"), "", 0, &err));
    assert_ok(rt_publish_bytes(test_tmp("d/Z"), "", 0, &err));
    assert_false(rt_path_is_dir(test_tmp("d/b")));
    assert_status(rt_mkdirs(test_tmp("d/b/c"), &err), IO);
    assert_status(rt_mkdirs("", &err), USAGE);
    assert_ok(rt_list_dir(test_tmp("d"), &names, &n, &err));
    assert_int_equal(n, 3);
    assert_string_equal(names[0], "Z");
    assert_string_equal(names[1], "b");
    assert_string_equal(names[2], "e");
    rt_names_free(names, n);
    assert_ok(rt_list_dir(test_tmp("d/e/f"), &names, &n, &err));
    assert_int_equal(n, 0);
    rt_names_free(names, n);
    assert_status(rt_list_dir(test_tmp("d/b"), &names, &n, &err), IO);
    assert_ok(rt_disk_free(test_tmp("d/not/yet/made"), &free_bytes, &err));
    assert_ok(rt_disk_free("also/not/made", &free_bytes, &err));
    assert_ok(rt_fsync_dir(test_tmp("d"), &err));
    assert_status(rt_fsync_dir(test_tmp("d/b"), &err), IO);
}

static void paths_join(void **state)
{
    struct rt_err err = {0};
    char out[8];
    (void)state;
    assert_ok(rt_path_join(out, sizeof out, "abc", "def", &err));
    assert_string_equal(out, "abc/def");
    assert_ok(rt_path_join(out, sizeof out, "ab/", "def", &err));
    assert_string_equal(out, "ab/def");
    assert_ok(rt_path_join(out, sizeof out, "", "def", &err));
    assert_string_equal(out, "def");
    assert_status(rt_path_join(out, sizeof out, "abc", "defg", &err), USAGE);
    assert_status(rt_path_join(out, sizeof out, "abcdefgh", "", &err), USAGE);
    assert_status(rt_path_join(out, sizeof out, "", "abcdefgh", &err), USAGE);
}

static void lock_is_exclusive(void **state)
{
    struct rt_err err = {0};
    int a, b;
    const char *dir = test_tmp("locked");
    (void)state;
    assert_ok(rt_mkdirs(dir, &err));
    assert_ok(rt_lock_dir(dir, &a, &err));
    assert_status(rt_lock_dir(dir, &b, &err), REFUSED);
    assert_int_equal(b, -1);
    rt_file_close(a);
    assert_ok(rt_lock_dir(dir, &b, &err));
    rt_file_close(b);
    assert_status(rt_lock_dir(test_tmp("not-there"), &b, &err), IO);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(reads_exactly),
    cmocka_unit_test(refuses_what_is_no_file),
    cmocka_unit_test(file_without_a_size),
    cmocka_unit_test(publish_is_all_or_nothing),
    cmocka_unit_test(publish_where_one_cannot_write),
    cmocka_unit_test(full_disk_leaves_the_old),
    cmocka_unit_test(append_mends_a_torn_line),
    cmocka_unit_test(directories),
    cmocka_unit_test(paths_join),
    cmocka_unit_test(lock_is_exclusive),
};
RT_SUITE(core_io, tests)
