"""accelerate_configs/: accelerate reads them as they are meant, and what can run without a GPU runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, read_metrics, run_main, tiny_args

CONFIGS = ROOT / "accelerate_configs"
YAML = {
    "one_gpu": {"distributed_type": "NO", "num_processes": 1, "num_machines": 1, "mixed_precision": "bf16"},
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": 8, "num_machines": 1, "mixed_precision": "bf16"},
    "multi_node": {"distributed_type": "MULTI_GPU", "num_processes": 16, "num_machines": 2, "mixed_precision": "bf16",
                   "main_process_ip": "10.0.0.1", "main_process_port": 29500, "rdzv_backend": "static"},
    "cpu_2_processes": {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1, "use_cpu": True,
                        "mixed_precision": "no"},
}  # fmt: skip
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_every_file_is_known_and_says_what_was_tested():
    files = {path.name: path.read_text() for path in CONFIGS.iterdir()}
    assert files.keys() == {*(f"{name}.yaml" for name in YAML), "slurm_multi_node.sh"}
    assert all("Tested: " in text.replace("\n# ", " ") for text in files.values())


@pytest.mark.parametrize("name", YAML)
def test_accelerate_reads_the_configuration(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(CONFIGS / f"{name}.yaml")
    config = load_config_from_file(path)
    found = {"distributed_type": config.distributed_type.value, "use_cpu": config.use_cpu}
    assert {key: found.get(key, getattr(config, key)) for key in YAML[name]} == YAML[name]
    assert config.compute_environment.value == "LOCAL_MACHINE" and config.main_training_function == "main"
    assert not (config.deepspeed_config or config.fsdp_config or config.dynamo_config)
    # and with it the launcher takes the branch that starts several processes, or one
    given = ["--config_file", path, str(SCRIPT), "--seed", "1"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert args.multi_gpu == (YAML[name]["num_processes"] > 1)
    assert (args.num_processes, args.mixed_precision) == (YAML[name]["num_processes"], YAML[name]["mixed_precision"])
    assert args.training_script_args == ["--seed", "1"]


def stop_after_two_steps(process, output, log, seconds=300):
    """Sends SIGTERM to the process alone once two steps are logged; returns its exit code."""
    deadline = time.monotonic() + seconds
    metrics = output / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        return process.wait(200)
    finally:
        process.kill()


def test_two_cpu_processes_with_accelerate_launch(tiny, shards, tmp_path):
    """SIGTERM to the launcher leaves a checkpoint of the last step."""
    output, log = tmp_path / "run", tmp_path / "log"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
              str(CONFIGS / "cpu_2_processes.yaml"), str(SCRIPT)]  # fmt: skip
    with open(log, "w") as file:
        command = launch + tiny_args(tiny, shards, output, "--max_train_steps", "100000")
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)
        assert stop_after_two_steps(process, output, log) != 0
    steps = len(read_metrics(output))
    assert [path.name for path in output.glob("*checkpoint-*")] == [f"checkpoint-{steps}"], log.read_text()[-3000:]
    state = (output / f"checkpoint-{steps}" / "state.json").read_text()
    assert re.search(r'"stride": 2\b', state)  # two processes, and not twice one


# ----------------------------------------------------------------------------------------------------------- SLURM

# what sbatch's, srun's and scancel's manuals say of them, for one node: scancel --signal reaches every process of the
# job's steps, but neither the batch shell nor srun, which is a part of the batch step
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@" &\necho $! > step\nwait $!',
    "scancel": f"""[ "$*" = "--signal=TERM 4242" ] && exec {sys.executable} -c '
import psutil
step = psutil.Process(int(open("step").read()))
for process in [step, *step.children(recursive=True)]:
    process.terminate()
'""",
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$*" >> requeued; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch script."""
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return {**ENVIRONMENT, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node[1]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}  # fmt: skip


def test_slurm_script_is_a_batch_script():
    path = CONFIGS / "slurm_multi_node.sh"
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[0] == "#!/bin/bash"
    assert all(not line.startswith("#SBATCH") for line in lines[first:])  # sbatch stops reading options there
    assert {"--requeue", "--nodes=2", "--ntasks-per-node=1", "--signal=B:TERM@300"} <= set(options)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_slurm_script_stops_with_a_checkpoint_and_requeues(tiny, shards, slurm, tmp_path):
    """Its SIGTERM reaches the loader's workers and both trainers once; torchrun must not repeat it."""
    output, log = tmp_path / "run", tmp_path / "log"
    flags = ["--max_train_steps", "100000", "--dataloader_num_workers", "1"]
    command = ["bash", str(CONFIGS / "slurm_multi_node.sh"), str(SCRIPT), *tiny_args(tiny, shards, output, *flags)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=slurm, cwd=tmp_path, stdout=file, stderr=file)
        assert stop_after_two_steps(process, output, log) != 0
    text = log.read_text()
    steps = len(read_metrics(output))
    assert [path.name for path in output.glob("*checkpoint-*")] == [f"checkpoint-{steps}"], text[-3000:]
    assert "Stopped by signal 15" in text and "exitcode  : 143" in text, text[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"


def test_slurm_script_that_fails_or_ends_is_not_requeued(slurm, tmp_path):
    """And always resumes: the requeued job has the command line of the first."""
    (tmp_path / "script.py").write_text("import sys\nopen('flags', 'w').write(' '.join(sys.argv[1:]))\nsys.exit(3)\n")
    command = ["bash", str(CONFIGS / "slurm_multi_node.sh"), "script.py", "--seed", "1"]
    environment = {**slurm, "SLURM_GPUS_ON_NODE": "1"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode not in (0, 143) and "exitcode  : 3" in result.stderr, result.stderr
    assert Path(tmp_path, "flags").read_text() == "--seed 1 --resume_from_checkpoint=latest"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("node", "given", "interface"), [(0, "", "ib1"), (1, "", "eth0"), (1, "bond0", "bond0")])
def test_slurm_script_tells_gloo_the_interface_to_another_node(slurm, tmp_path, node, given, interface):
    stand_ins = {
        "torchrun": 'echo "$GLOO_SOCKET_IFNAME"',
        "scontrol": "printf 'a0\\na1\\n'",
        "getent": 'echo "10.0.0.${2#a} STREAM $2"',
        "ip": '[[ $4 = *.1 ]] && dev=ib1 || dev=eth0; echo "$4 dev $dev src 10.0.0.9 uid 0 \\    cache"',
    }
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**slurm, "SLURM_NNODES": "2", "SLURM_NODEID": str(node), "GLOO_SOCKET_IFNAME": given}
    command = ["bash", str(CONFIGS / "slurm_multi_node.sh"), "script.py"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == (f"{interface}\n", "")


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_sharded_training_is_refused(lcm, tiny, shards, tmp_path, monkeypatch, name):
    """`accelerate launch` sets these variables. A checkpoint would hold one rank's part, or saving would dead-lock."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(SystemExit, match=f"(?i)^error: .*{name.split('_')[0]}.*MULTI_GPU") as end:
        run_main(lcm, tiny_args(tiny, shards, tmp_path))
    assert "\n" not in end.value.code


def test_processes_that_do_not_find_each_other_are_refused(lcm, tiny, shards, tmp_path, monkeypatch):
    """Two processes without GPU and without ACCELERATE_USE_CPU: each would write the same files as if it were alone."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for variable, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match="^error: .*ACCELERATE_USE_CPU=true") as end:
        run_main(lcm, tiny_args(tiny, shards, tmp_path))
    assert "\n" not in end.value.code
