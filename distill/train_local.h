/* `train --gpus N` without a launcher: N ranks of this program on this machine. */
#ifndef RT_DISTILL_TRAIN_LOCAL_H
#define RT_DISTILL_TRAIN_LOCAL_H

#include "distill/command.h"

/* Starts the command of ctx n times, with the variables of a launcher and with --threads N where threads is above 0, and waits for all. A stop that is
 * asked for is passed on once; ranks that stop take their time to save. When one fails the others are given some seconds to find out by themselves, then
 * ended. The status is that of the first one that failed, INTERRUPTED where none did worse: the exit codes of both are the same; each says on stderr why.
 * USAGE where the program cannot start itself. */
enum rt_status rt_train_local(struct rt_context *ctx, int n, int threads, struct rt_err *err);

#endif
