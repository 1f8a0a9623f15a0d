/* What `make fuzz` has found worth keeping: every input of tests/fuzz/corpus, and of crashes
 * that were mended, through the fuzzer's harness. A second argument names one input. */
#include "../fuzz/fuzz.h"

#include <dirent.h>
#include <sys/stat.h>

#define CORPUS "tests/fuzz/corpus"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void run_file(const char *path) {
    struct stat info;
    FILE *file = fopen(path, "rb");

    if (!file || fstat(fileno(file), &info))
        FAIL("%s cannot be read", path);
    uint8_t *data = malloc((size_t)info.st_size + 1);
    CHECK(data && fread(data, 1, (size_t)info.st_size, file) == (size_t)info.st_size);
    fclose(file);
    fprintf(stderr, "%s\n", path); /* the last one named is the one that failed */
    LLVMFuzzerTestOneInput(data, (size_t)info.st_size);
    free(data);
}

int main(int argc, char **argv) {
    struct dirent **entries;
    size_t n_run = 0;

    fuzz_device = argc > 1 ? argv[1] : "host";
    if (argc > 2) {
        run_file(argv[2]);
        return 0;
    }
    int n = scandir(CORPUS, &entries, NULL, alphasort);
    if (n < 0)
        FAIL("%s is not here: run the tests in the folder of the Makefile", CORPUS);
    for (int i = 0; i < n; i++) {
        char path[512];
        snprintf(path, sizeof path, CORPUS "/%s", entries[i]->d_name);
        if (entries[i]->d_name[0] != '.') {
            run_file(path);
            n_run++;
        }
        free(entries[i]);
    }
    free(entries);
    CHECK(n_run > 0);
    return 0;
}
