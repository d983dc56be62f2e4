/* Loads a SavedModel through TensorFlow's C API, as a server does, and asks one of its signatures.

   run_saved_model FOLDER INPUT PROBABILITIES NAMES uint8 FILE DIM...
       FILE holds the values of a uint8 tensor of these dimensions.
   run_saved_model FOLDER INPUT PROBABILITIES NAMES string DIM,DIM FILE...
       Each file is an element of a string tensor.

   INPUT, PROBABILITIES and NAMES are operation names with an output's number, as NAME:0. Prints a line of probabilities
   and a line of each name; an error of TensorFlow goes to stderr, with exit status 3. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

static void fail(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(2);
}

static char* read_file(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  if (!file) fail(path, "cannot be opened");
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char* content = malloc(*size + 1);
  if (fread(content, 1, *size, file) != *size) fail(path, "cannot be read");
  fclose(file);
  return content;
}

static TF_Output output_of(TF_Graph* graph, const char* name) {
  char operation[256];
  snprintf(operation, sizeof operation, "%s", name);
  char* colon = strrchr(operation, ':');
  if (!colon) fail(name, "is not NAME:NUMBER");
  *colon = 0;
  TF_Output output = {TF_GraphOperationByName(graph, operation), atoi(colon + 1)};
  if (!output.oper) fail(name, "is not in the graph");
  return output;
}

static void check(TF_Status* status) {
  if (TF_GetCode(status) == TF_OK) return;
  fprintf(stderr, "%s\n", TF_Message(status));
  exit(3);
}

static TF_Tensor* numbers(const char* path, int rank, char** dims) {
  int64_t shape[8];
  size_t size, count = 1;
  for (int i = 0; i < rank; ++i) count *= (size_t)(shape[i] = atoll(dims[i]));
  char* content = read_file(path, &size);
  if (size != count) fail(path, "does not have as many values as the dimensions say");
  TF_Tensor* tensor = TF_AllocateTensor(TF_UINT8, shape, rank, size);
  memcpy(TF_TensorData(tensor), content, size);
  return tensor;
}

static TF_Tensor* strings(const char* dims, char** paths) {
  int64_t shape[2];
  if (sscanf(dims, "%ld,%ld", &shape[0], &shape[1]) != 2) fail(dims, "is not DIM,DIM");
  size_t count = (size_t)(shape[0] * shape[1]);
  TF_Tensor* tensor = TF_AllocateTensor(TF_STRING, shape, 2, count * sizeof(TF_TString));
  TF_TString* elements = TF_TensorData(tensor);
  for (size_t i = 0; i < count; ++i) {
    size_t size;
    char* content = read_file(paths[i], &size);
    TF_StringInit(&elements[i]);
    TF_StringCopy(&elements[i], content, size);
    free(content);
  }
  return tensor;
}

int main(int argc, char** argv) {
  if (argc < 8) fail("the command line", "too short");
  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status);

  TF_Output input = output_of(graph, argv[2]);
  TF_Output outputs[] = {output_of(graph, argv[3]), output_of(graph, argv[4])};
  TF_Tensor* fed = strcmp(argv[5], "uint8") ? strings(argv[6], argv + 7) : numbers(argv[6], argc - 7, argv + 7);
  TF_Tensor* found[2];
  TF_SessionRun(session, NULL, &input, &fed, 1, outputs, found, 2, NULL, 0, NULL, status);
  check(status);

  const float* probabilities = TF_TensorData(found[0]);
  for (int64_t i = 0; i < TF_TensorElementCount(found[0]); ++i) printf(i ? " %.9g" : "%.9g", probabilities[i]);
  const TF_TString* names = TF_TensorData(found[1]);
  for (int64_t i = 0; i < TF_TensorElementCount(found[1]); ++i)
    printf("\n%.*s", (int)TF_StringGetSize(&names[i]), TF_StringGetDataPointer(&names[i]));
  printf("\n");
  return 0;
}
