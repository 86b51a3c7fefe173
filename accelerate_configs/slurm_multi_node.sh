#!/bin/bash
# Several nodes under SLURM, with torchrun. Edit the lines below, then
#
#   sbatch accelerate_configs/slurm_multi_node.sh train_lcm_distill_sd_wds.py @run.args
#
# in which run.args holds the flags, --mixed_precision=bf16 and an --output_dir that all nodes share among them. Five
# minutes before the time limit every trainer gets SIGTERM, finishes its step and writes a checkpoint; the job is then
# put back into the queue and goes on from there. Clusters that preempt jobs do the same where SLURM's
# PreemptParameters has send_user_signal.
#
# Tested: tests/test_configs.py runs this script on two CPU processes, with stand-ins for srun, scancel and scontrol
# that act as SLURM's manual says. Not yet run on a cluster.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=$(head -n 1 <<< "$HOSTS")
LAST=$(tail -n 1 <<< "$HOSTS")
PORT=$((20000 + SLURM_JOB_ID % 10000))
export HEAD LAST PORT

# B: above sends the signal to this shell alone, which so knows that it must requeue; scancel sends it on to all
# processes of the step, and not to this shell or srun.
is_stopped=
trap 'is_stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# SIGTERM reaches trainers and torchrun alike. torchrun has to ignore it: it would send it to the trainers once more,
# and a second one ends a trainer without a checkpoint. Trainers inherit "ignore", and set their own handler later.
#
# gloo, in which the ranks meet on the host, listens where the node's own name points, often 127.0.0.1: it is told the
# interface that leads to another node.
srun --kill-on-bad-exit=1 bash -c '
    trap "" TERM
    if [ "$SLURM_NNODES" -gt 1 ] && [ -z "$GLOO_SOCKET_IFNAME" ]; then
        [ "$SLURM_NODEID" = 0 ] && other=$LAST || other=$HEAD
        read -r address _ < <(getent ahosts "$other")
        GLOO_SOCKET_IFNAME=$(ip -o route get "$address" | sed -n "s/.* dev \([^ ]*\).*/\1/p")
        [ -z "$GLOO_SOCKET_IFNAME" ] || export GLOO_SOCKET_IFNAME
    fi
    exec torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" --rdzv_id "$SLURM_JOB_ID" \
        --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --signals-to-handle SIGINT,SIGHUP,SIGQUIT "$@"
' torchrun "$@" --resume_from_checkpoint=latest &
step=$!

# a trap runs only between two commands, so not while srun is in the foreground; it ends the `wait`, not the step
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do
    wait "$step"
    status=$?
done
[ -z "$is_stopped" ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
