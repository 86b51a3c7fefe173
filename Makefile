# `make test` and `make demo` need Python 3.10 or newer and nothing else: they make .venv from requirements.txt first.
PYTHON := .venv/bin/python
# threads that spin while they wait make everything else on a busy machine crawl
export OMP_WAIT_POLICY := PASSIVE

.venv/installed: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --requirement requirements.txt
	touch $@

.PHONY: test lint demo demo-long clean

test: lint
	$(PYTHON) -m pytest

lint: .venv/installed
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) tools/copies.py

demo: .venv/installed
	rm -rf demo/output
	$(PYTHON) train_lcm_distill_sd_wds.py @demo/lcm.args
	cp demo/output/samples.png demo/output/comparison.png

demo-long: .venv/installed
	rm -rf demo/output-long
	$(PYTHON) train_lcm_distill_sd_wds.py @demo/lcm-long.args
	cp demo/output-long/samples.png demo/output-long/comparison.png

clean:
	rm -rf .venv .pytest_cache .ruff_cache demo/output*
	find . -name __pycache__ -prune -exec rm -r {} +
