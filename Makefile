# The whole chain: checkpoint -> graphs -> data -> outputs -> report. `make help` lists what can be asked.
# Every result is a folder whose manifest.json is written last, so the manifests are the files that make compares.

PYTHON ?= python3
MODEL ?= blip-demo
CHECKPOINT ?= $(or $(CHECKPOINT_$(MODEL)),demo/weights.safetensors)
CHECKPOINT_blip2-demo := demo/blip2.safetensors
CHECKPOINT_blip2-opt-demo := demo/blip2_opt.safetensors
VIT_CHECKPOINT ?= $(if $(filter blip2-opt-demo,$(MODEL)),demo/blip2.safetensors)
LLM_CHECKPOINT ?= $(if $(filter blip2-opt-demo,$(MODEL)),demo/llm)
TOKENIZER ?= $(if $(filter blip2-opt-demo,$(MODEL)),demo/llm,demo/tokenizer)
OUT ?= $(if $(filter blip-demo,$(MODEL)),build,build/$(MODEL))
IMAGES ?= $(OUT)/pictures
ANNOTATIONS ?= $(OUT)/pictures/test.json
LABELLED ?= $(OUT)/labelled
TEMPLATE ?= $(if $(filter blip-demo blip2-demo,$(MODEL)),a {})
BATCHSIZE ?= 16
K_TEST ?=
QUESTIONS ?=
CAPTION_OPTIONS ?= $(CAPTION_OPTIONS_$(MODEL))
CAPTION_OPTIONS_blip-caption-demo := --prompt "" --max-length 40
# LAVIS's penalty on words that were there would forbid what these captions say twice.
CAPTION_OPTIONS_blip2-opt-demo := --prompt "" --max-length 40 --num-beams 3 --repetition-penalty 1 --length-penalty 1
ANSWER_OPTIONS ?=
SOC ?=
CANN ?= 8
OM_BATCHSIZE ?= 1,16
EXPORT_OPTIONS ?=
ATC_OPTIONS ?=

BIN := .venv/bin
READY := .venv/.ready

# What each step is told. A step runs again when its line changes, not only when a file does.
EXPORT_ARGS := --model $(MODEL) --checkpoint "$(CHECKPOINT)" --tokenizer "$(TOKENIZER)" \
    $(if $(VIT_CHECKPOINT),--vit-checkpoint "$(VIT_CHECKPOINT)") $(if $(LLM_CHECKPOINT),--llm-checkpoint "$(LLM_CHECKPOINT)")
DATA_ARGS := --annotations "$(ANNOTATIONS)" --images "$(IMAGES)"
RUN_ARGS := --batchsize $(BATCHSIZE) $(if $(K_TEST),--k-test $(K_TEST))
LABEL_ARGS := --images "$(LABELLED)"
CAPTION_ARGS := --batchsize $(BATCHSIZE) $(CAPTION_OPTIONS)
ANSWER_DATA_ARGS := --images "$(IMAGES)" --questions "$(QUESTIONS)" $(if $(filter file,$(origin ANNOTATIONS)),,--annotations "$(ANNOTATIONS)")
ANSWER_ARGS := --batchsize $(BATCHSIZE) $(ANSWER_OPTIONS)
# CANN 6 reads opsets up to 13.
ASCEND_ARGS := $(EXPORT_ARGS) --target ascend $(if $(filter 6,$(CANN)),$(if $(findstring --opset,$(EXPORT_OPTIONS)),,--opset 13)) $(EXPORT_OPTIONS)
ATC_ARGS := --batchsize $(OM_BATCHSIZE) --cann $(CANN) $(if $(SOC),--soc $(SOC)) $(ATC_OPTIONS)
# Training moves the query that fits a caption best; of the demo's small number the first need not be one that speaks for it.
CLASSIFY_ARGS := --batchsize $(BATCHSIZE) $(if $(TEMPLATE),--template "$(TEMPLATE)") $(if $(filter blip2-demo,$(MODEL)),--query max)

# Mistakes that would otherwise show after minutes of work, or as a message of make about itself.
$(foreach name,OUT CHECKPOINT VIT_CHECKPOINT LLM_CHECKPOINT TOKENIZER ANNOTATIONS IMAGES LABELLED QUESTIONS,$(if $(word 2,$($(name))),\
    $(error $(name)="$($(name))" holds a space, which make cannot handle; the blip-* commands can)))
$(if $(findstring ',$(TEMPLATE))$(findstring ",$(TEMPLATE)),$(error TEMPLATE=$(TEMPLATE) holds a quote, which make cannot handle; blip-run classify can))
ifeq ($(filter blip-demo blip-caption-demo blip2-demo blip2-opt-demo,$(MODEL)),)
ifneq ($(findstring file,$(origin CHECKPOINT) $(origin TOKENIZER)),)
$(error MODEL=$(MODEL) needs its own CHECKPOINT=... and TOKENIZER=...)
endif
endif

# Without annotations of one's own the pictures are drawn.
ifneq ($(QUESTIONS),)
PICTURES :=
else ifeq ($(origin ANNOTATIONS) $(origin IMAGES),file file)
PICTURES := $(OUT)/pictures/test.json
else ifneq ($(findstring file,$(origin ANNOTATIONS) $(origin IMAGES)),)
$(error ANNOTATIONS=... and IMAGES=... go together; give both, or neither for the drawn pictures)
else
PICTURES := $(wildcard $(ANNOTATIONS))
endif

STEPS := graphs data outputs report label-data label-outputs label-report \
    caption-data caption-outputs caption-report answer-data answer-outputs answer-report ascend-graphs om atc

# Without labelled pictures of one's own they are drawn too.
LABELS := $(if $(filter file,$(origin LABELLED)),$(OUT)/labelled/.made.json,$(wildcard $(LABELLED) $(LABELLED)/*))

# A manifest is there only when its folder is complete: make must not delete it when it is interrupted.
.PRECIOUS: $(foreach step,$(STEPS),$(OUT)/$(step)/manifest.json) $(OUT)/pictures/test.json
.PHONY: demo demo-blip2 second-stage test lint export data run report classify captions answers om atc-script bench train train-blip2 training-pictures clean help FORCE
.DEFAULT_GOAL := help

demo: report  ## the main job on the embedded model and drawn pictures: prints recall and captions, writes report.html
	@if [ $(MODEL) = blip-demo ]; then $(MAKE) --no-print-directory MODEL=blip-caption-demo OUT="$(OUT)/captions" \
	    IMAGES="$(IMAGES)" ANNOTATIONS="$(ANNOTATIONS)" captions; fi
demo-blip2:  ## the same with BLIP-2, both stages, and zero-shot classification of drawn pictures
	@$(MAKE) --no-print-directory MODEL=blip2-demo report classify second-stage
second-stage: report
	@$(MAKE) --no-print-directory MODEL=blip2-opt-demo OUT="$(OUT)/captions" IMAGES="$(IMAGES)" ANNOTATIONS="$(ANNOTATIONS)" captions
test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
export: $(OUT)/graphs/manifest.json  ## CHECKPOINT of MODEL, with TOKENIZER -> OUT/graphs
data: $(OUT)/data/manifest.json  ## IMAGES and ANNOTATIONS -> OUT/data
run: $(OUT)/outputs/manifest.json  ## graphs x data -> OUT/outputs, in batches of BATCHSIZE
report: $(OUT)/report/manifest.json  ## outputs -> OUT/report: recall, report.json, report.html
	@cat "$(OUT)/report/report.txt"; echo "$(OUT)/report/report.html"
classify: $(OUT)/label-report/manifest.json  ## LABELLED, a folder of class folders -> OUT/label-report: top-1 and top-5
	@cat "$(OUT)/label-report/report.txt"; echo "$(OUT)/label-report/report.html"
captions: $(OUT)/caption-report/manifest.json  ## pictures -> OUT/caption-report: captions, and how good they are; CAPTION_OPTIONS for blip-run
	@cat "$(OUT)/caption-report/report.txt"
	@if [ "$(filter blip-caption-demo blip2-opt-demo,$(MODEL))" ]; then $(BIN)/python -m demo.attributes --captions "$(OUT)/caption-outputs/captions.json"; fi
	@echo "$(OUT)/caption-report/report.html"
answers: $(OUT)/answer-report/manifest.json  ## QUESTIONS about IMAGES, ANNOTATIONS with their answers -> OUT/answer-report; ANSWER_OPTIONS for blip-run
	@cat "$(OUT)/answer-report/report.txt"; echo "$(OUT)/answer-report/report.html"
om: $(OUT)/om/manifest.json  ## CHECKPOINT -> OUT/ascend-graphs -> OUT/om by ATC, for SOC (such as Ascend310P3), CANN and each of OM_BATCHSIZE; ATC_OPTIONS for blip-atc
	@echo "$(OUT)/om"
atc-script: $(OUT)/atc/manifest.json  ## the same as a script, OUT/atc/atc.sh, for a host that has CANN and no Python
	@echo "$(OUT)/atc/atc.sh"
bench: $(OUT)/graphs/manifest.json  ## time every graph in batches of BATCHSIZE
	$(BIN)/python -m bench --graphs "$(OUT)/graphs" --batchsize $(BATCHSIZE)
# Models as small as these are no faster with more threads.
train train-blip2: export OMP_NUM_THREADS := 1
train: training-pictures  ## train the demo's BLIP again, into build/demo/training (takes long; goes on where it was stopped)
	$(BIN)/blip-train pretrain --config demo-pretrain --resume
train-blip2: training-pictures  ## train the demo's BLIP-2 again: both stages, and the language model between them
	$(BIN)/blip-train stage1 --config demo-stage1 --resume
	test -d build/demo/llm || $(BIN)/python -m demo.train_llm --out build/demo/llm
	$(BIN)/blip-train stage2 --config demo-stage2 --set model.checkpoint=build/demo/training-blip2/weights.safetensors \
	    --set model.llm_checkpoint=build/demo/llm --resume
training-pictures: $(READY)
	$(BIN)/python -m demo.shapes --out build/demo/training-pictures --split train --count 30000 --names
	$(BIN)/python -m demo.shapes --out build/demo/training-pictures --split test --count 500
clean:  ## remove what the steps wrote to OUT, and nothing else
	@if [ -d "$(OUT)/captions" ]; then $(MAKE) --no-print-directory OUT="$(OUT)/captions" clean; rmdir "$(OUT)/captions" || true; fi
	@for step in $(STEPS); do \
	    if [ -f "$(OUT)/$$step/manifest.json" ]; then rm -rf "$(OUT)/$$step"; fi; \
	    rm -rf "$(OUT)/.$$step.part" "$(OUT)/.$$step.old"; \
	done
	@if [ -f "$(OUT)/pictures/.test.made.json" ]; then rm -rf "$(OUT)/pictures"; fi
	@if [ -f "$(OUT)/labelled/.made.json" ]; then rm -rf "$(OUT)/labelled"; fi
	@rm -f "$(OUT)"/.*.args
help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*##/  make \1 -/'
	@echo 'Variables: MODEL CHECKPOINT VIT_CHECKPOINT LLM_CHECKPOINT TOKENIZER IMAGES ANNOTATIONS QUESTIONS LABELLED TEMPLATE BATCHSIZE K_TEST' \
	    'CAPTION_OPTIONS ANSWER_OPTIONS EXPORT_OPTIONS ATC_OPTIONS SOC CANN OM_BATCHSIZE OUT PYTHON; now MODEL=$(MODEL) OUT=$(OUT)'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(OUT)/pictures/test.json: $(READY) demo/shapes.py demo/scenes.py demo/captions.py
	$(BIN)/python -m demo.shapes --out "$(OUT)/pictures" --split test --count 500
	touch "$@"

$(OUT)/graphs/manifest.json: $(OUT)/.export.args $(wildcard $(CHECKPOINT) $(VIT_CHECKPOINT) $(LLM_CHECKPOINT) $(TOKENIZER)) | $(READY)
	$(BIN)/python -m export $(EXPORT_ARGS) --out "$(OUT)/graphs"

$(OUT)/ascend-graphs/manifest.json: $(OUT)/.ascend.args $(wildcard $(CHECKPOINT) $(VIT_CHECKPOINT) $(LLM_CHECKPOINT) $(TOKENIZER)) | $(READY)
	$(BIN)/python -m export $(ASCEND_ARGS) --out "$(OUT)/ascend-graphs"

$(OUT)/om/manifest.json: $(OUT)/.om.args $(OUT)/ascend-graphs/manifest.json
	$(BIN)/python -m export.atc --graphs "$(OUT)/ascend-graphs" $(ATC_ARGS) --out "$(OUT)/om"

$(OUT)/atc/manifest.json: $(OUT)/.om.args $(OUT)/ascend-graphs/manifest.json
	$(BIN)/python -m export.atc --graphs "$(OUT)/ascend-graphs" $(ATC_ARGS) --script --out "$(OUT)/atc"

$(OUT)/data/manifest.json: $(OUT)/.data.args $(OUT)/graphs/manifest.json $(PICTURES) | $(READY)
	$(BIN)/python -m preprocess retrieval $(DATA_ARGS) --graphs "$(OUT)/graphs" --out "$(OUT)/data"

$(OUT)/outputs/manifest.json: $(OUT)/.run.args $(OUT)/graphs/manifest.json $(OUT)/data/manifest.json | $(READY)
	$(BIN)/python -m runtime retrieval --graphs "$(OUT)/graphs" --data "$(OUT)/data" --out "$(OUT)/outputs" $(RUN_ARGS)
	touch "$@"

$(OUT)/report/manifest.json: $(OUT)/outputs/manifest.json | $(READY)
	$(BIN)/python -m postprocess --recall --outputs "$(OUT)/outputs" --out "$(OUT)/report" > /dev/null

$(OUT)/labelled/.made.json: $(READY) demo/labelled.py demo/shapes.py demo/scenes.py
	$(BIN)/python -m demo.labelled --out "$(OUT)/labelled"
	touch "$@"

$(OUT)/label-data/manifest.json: $(OUT)/.labels.args $(OUT)/graphs/manifest.json $(LABELS) | $(READY)
	$(BIN)/python -m preprocess classify $(LABEL_ARGS) --graphs "$(OUT)/graphs" --out "$(OUT)/label-data"

$(OUT)/label-outputs/manifest.json: $(OUT)/.classify.args $(OUT)/graphs/manifest.json $(OUT)/label-data/manifest.json | $(READY)
	$(BIN)/python -m runtime classify --graphs "$(OUT)/graphs" --data "$(OUT)/label-data" --out "$(OUT)/label-outputs" $(CLASSIFY_ARGS)
	touch "$@"

$(OUT)/label-report/manifest.json: $(OUT)/label-outputs/manifest.json | $(READY)
	$(BIN)/python -m postprocess --top1 --outputs "$(OUT)/label-outputs" --out "$(OUT)/label-report" > /dev/null

$(OUT)/caption-data/manifest.json: $(OUT)/.data.args $(OUT)/graphs/manifest.json $(PICTURES) | $(READY)
	$(BIN)/python -m preprocess caption $(DATA_ARGS) --graphs "$(OUT)/graphs" --out "$(OUT)/caption-data"

$(OUT)/caption-outputs/manifest.json: $(OUT)/.caption.args $(OUT)/graphs/manifest.json $(OUT)/caption-data/manifest.json | $(READY)
	$(BIN)/python -m runtime caption --graphs "$(OUT)/graphs" --data "$(OUT)/caption-data" --out "$(OUT)/caption-outputs" $(CAPTION_ARGS)
	touch "$@"

$(OUT)/caption-report/manifest.json: $(OUT)/caption-outputs/manifest.json | $(READY)
	$(BIN)/python -m postprocess --captions --outputs "$(OUT)/caption-outputs" --out "$(OUT)/caption-report" > /dev/null

$(OUT)/answer-data/manifest.json: $(OUT)/.questions.args $(OUT)/graphs/manifest.json $(wildcard $(QUESTIONS) $(ANNOTATIONS)) | $(READY)
	$(BIN)/python -m preprocess vqa $(ANSWER_DATA_ARGS) --graphs "$(OUT)/graphs" --out "$(OUT)/answer-data"

$(OUT)/answer-outputs/manifest.json: $(OUT)/.answer.args $(OUT)/graphs/manifest.json $(OUT)/answer-data/manifest.json | $(READY)
	$(BIN)/python -m runtime vqa --graphs "$(OUT)/graphs" --data "$(OUT)/answer-data" --out "$(OUT)/answer-outputs" $(ANSWER_ARGS)
	touch "$@"

$(OUT)/answer-report/manifest.json: $(OUT)/answer-outputs/manifest.json | $(READY)
	$(BIN)/python -m postprocess --vqa --outputs "$(OUT)/answer-outputs" --out "$(OUT)/answer-report" > /dev/null

# Written only when the text differs, so that what depends on it stays up to date.
$(OUT)/.export.args: ARGS = $(EXPORT_ARGS)
$(OUT)/.ascend.args: ARGS = $(ASCEND_ARGS)
$(OUT)/.om.args: ARGS = $(ATC_ARGS)
$(OUT)/.data.args: ARGS = $(DATA_ARGS)
$(OUT)/.run.args: ARGS = $(RUN_ARGS)
$(OUT)/.labels.args: ARGS = $(LABEL_ARGS)
$(OUT)/.classify.args: ARGS = $(CLASSIFY_ARGS)
$(OUT)/.caption.args: ARGS = $(CAPTION_ARGS)
$(OUT)/.questions.args: ARGS = $(ANSWER_DATA_ARGS)
$(OUT)/.answer.args: ARGS = $(ANSWER_ARGS)
$(OUT)/.%.args: FORCE
	@mkdir -p "$(OUT)"
	@printf '%s\n' '$(ARGS)' | cmp -s - "$@" || printf '%s\n' '$(ARGS)' > "$@"
FORCE:
