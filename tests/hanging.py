"""A library that is preloaded into a process: reads and listings of what is named HANG never return."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
#include <limits.h>

/* A file hangs while its path contains the value of HANG and the file named by HANG_WHILE is there. */
static void maybe_hang(int fd) {
    const char *word = getenv("HANG"), *sign = getenv("HANG_WHILE");
    char link[64], path[PATH_MAX];
    if (!word || !sign) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    if (!strstr(path, word)) return;
    while (access(sign, F_OK) == 0) usleep(20000);
}

ssize_t read(int fd, void *buffer, size_t count) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "read");
    maybe_hang(fd);
    return real(fd, buffer, count);
}

struct dirent64 *readdir64(DIR *directory) {
    static struct dirent64 *(*real)(DIR *);
    if (!real) real = dlsym(RTLD_NEXT, "readdir64");
    maybe_hang(dirfd(directory));
    return real(directory);
}

struct dirent *readdir(DIR *directory) {
    static struct dirent *(*real)(DIR *);
    if (!real) real = dlsym(RTLD_NEXT, "readdir");
    maybe_hang(dirfd(directory));
    return real(directory);
}
"""


def library(directory: Path) -> Path | None:
    """The compiled library, or None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source, target = directory / "hang.c", directory / "hang.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", target, source, "-ldl"], check=True)
    return target
