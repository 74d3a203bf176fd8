// The clock of a host that is wrong by WRONG_BY seconds, for Python and the storage client there (LD_PRELOAD).
//
// Others see the right one: C++ waits until absolute times, which the kernel compares with its own clock.
#include <dlfcn.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

static bool is_deceived(void* caller) {
    Dl_info found;
    if (!dladdr(caller, &found) || !found.dli_fname) return false;
    const char* slash = strrchr(found.dli_fname, '/');
    const char* name = slash ? slash + 1 : found.dli_fname;
    return !strncmp(name, "python", 6) || !strncmp(name, "libpython", 9) || !strncmp(name, "_obstore", 8);
}

static long wrong_by(void* caller) {
    const char* seconds = getenv("WRONG_BY");
    return seconds && is_deceived(caller) ? atol(seconds) : 0;
}

extern "C" int clock_gettime(clockid_t clock, struct timespec* now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += wrong_by(__builtin_return_address(0));
    return failed;
}

extern "C" int gettimeofday(struct timeval* now, void*) {
    struct timespec found;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec + wrong_by(__builtin_return_address(0));
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

extern "C" time_t time(time_t* now) {
    struct timespec found;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &found);
    time_t told = found.tv_sec + wrong_by(__builtin_return_address(0));
    if (now) *now = told;
    return told;
}
