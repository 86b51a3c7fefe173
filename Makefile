# `make test` and `make demo` need Python 3.10 or newer and nothing else: they make .venv from requirements.txt first.
PYTHON := .venv/bin/python

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --requirement requirements.txt
	touch $@

.PHONY: test lint demo demo-lcm demo-tcd demo-tcd-lora demo-cd4 demo-cd1 demo-progressive demo-ct demo-evaluate clean

# the tests run side by side, where threads that spin while they wait make everything else crawl
test: export OMP_WAIT_POLICY := PASSIVE
test: lint
	$(PYTHON) -m pytest

lint: .venv/installed
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) tools/copies.py

# each distils the demo teacher with demo/<method>.args into demo/output-<method>
demo-lcm: SCRIPT := train_lcm_distill_sd_wds.py
demo-tcd: SCRIPT := train_tcd_distill_sd_wds.py
demo-tcd-lora: SCRIPT := train_tcd_distill_lora_sd_wds.py
demo demo-cd4 demo-cd1: SCRIPT := train_cd_multiboundary.py
demo-ct: SCRIPT := train_ct.py
# a demo runs alone: threads that spin for some microseconds make it 15 to 60 % faster than none
demo demo-lcm demo-tcd demo-tcd-lora demo-cd4 demo-cd1 demo-progressive demo-ct: export GOMP_SPINCOUNT := 20000

demo demo-lcm demo-tcd demo-tcd-lora demo-cd4 demo-cd1 demo-ct: .venv/installed
	rm -rf $(@:demo%=demo/output%)
	$(PYTHON) $(SCRIPT) @demo/$(@:demo-%=%).args
	cp $(@:demo%=demo/output%)/samples.png $(@:demo%=demo/output%)/comparison.png

# each stage begins with the student of the one before
demo-progressive: .venv/installed
	rm -rf demo/output-progressive
	$(PYTHON) train_cd_multiboundary.py @demo/progressive.args --num_boundaries 8 --output_dir demo/output-progressive/8
	for k in 4 2 1; do $(PYTHON) train_cd_multiboundary.py @demo/progressive.args --num_boundaries $$k \
		--init_from demo/output-progressive/$$((2 * k)) --output_dir demo/output-progressive/$$k || exit; done

# compares the students that are there with their teacher, on captions that no setting was chosen by; see docs/evaluation.md
demo-evaluate: export GOMP_SPINCOUNT := 20000
demo-evaluate: .venv/installed
	$(PYTHON) tools/evaluate.py --teacher demo/teacher scheduler.timestep_spacing=trailing --guidance_scale 3 \
		--rows demo/evaluate.yaml --skip_missing --prompts $(PROMPTS) --images_per_prompt $(PICTURES) \
		--features vae --batch_size 32 --output_dir demo/evaluation
demo-evaluate: PROMPTS := demo/prompts_test_full.txt demo/prompts_test_unstyled.txt demo/prompts_test_category.txt
demo-evaluate: PICTURES := 4

clean:
	rm -rf .venv .pytest_cache .ruff_cache demo/output* demo/evaluation
	find . -name __pycache__ -prune -exec rm -r {} +
