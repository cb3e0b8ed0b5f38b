"""The choices behind the default bundle: which risks, which texts, which settings."""

from __future__ import annotations

from sae_core.training.dense_heads import HeadConfig
from sae_core.training.discovery import BROAD, ClusterPlan
from sae_core.training.sae_train_config import SAETrainConfig

DENSE_HOOK_POINT = "blocks.8.hook_resid_post"
"""The ninth of Gemma 3 270M's eighteen layers: the middle, where topics are linear already."""
HOOK_POINTS = (DENSE_HOOK_POINT,)

SAE_CONFIG = SAETrainConfig(
    d_sae=8192,
    l0_target=48.0,
    total_tokens=3_100_000,
    learning_rate=2e-3,
    buffer_tokens=65_536,
)
"""Rate and tempering from short runs on 120,000 tokens (FVU 0.26 at 1e-3, 0.08 at 3e-3; median
dimension 3.2 without tempering, 0.55 to 0.80 with it); 2e-3 for a run 25 times as long."""

CORPUS_KEEP = {
    "safety_train_harmful": 1.0,
    "safety_train_benign": 1.0,
    "toxigen_prompts": 1.0,
    "hate_tweets": 1.0,
    "self_instruct_seeds": 1.0,
    "hh_harmless_dialogues": 0.8,
    "coconot_pref": 0.6,
    "diasafety_dialogues": 0.5,
    "gpteacher": 0.3,
    "topical_chat": 0.15,
    "gsm8k_train": 0.15,
    "sgd_dialogues": 0.08,
    "books_pre1928": 0.05,
}
CORPUS_KEEP_OTHERS = 0.095
"""Share of each source's documents: in 3 million tokens a fair sample of the corpus would hold 4 %
of harmful and dialogue text, too little for a dictionary that must tell risks apart."""

HEAD_CONFIG = HeadConfig(n_folds=5, l2_grid=(1e-2, 3e-2, 1e-1), n_latents=32)

ORIGINS = {
    "advbench": "AdvBench",
    "advbench_strings": "AdvBench",
    "catqa": "red-instruct",
    "dangerousqa": "red-instruct",
    "harmfulqa": "red-instruct",
    "gptfuzz_questions": "GPTFuzz",
    "gptfuzz_responses": "GPTFuzz",
    "gptfuzz_templates": "GPTFuzz",
    "gpteacher_codegen": "GPTeacher",
    "gpteacher_codegen_responses": "GPTeacher",
    "gpteacher_roleplay": "GPTeacher",
    "gpteacher_roleplay_responses": "GPTeacher",
    "cse_interpreter": "CyberSecEval",
    "cse_mitre_frr": "CyberSecEval",
    "cse_prompt_injection": "CyberSecEval",
    "self_instruct": "self-instruct",
    "self_instruct_outputs": "self-instruct",
}

PLANS = (
    ClusterPlan(
        id="harmful_request",
        title="Harmful content of any kind",
        severity="warning",
        categories=(BROAD,),
    ),
    ClusterPlan(
        id="cyber_malware",
        title="Malware and intrusion",
        severity="critical",
        categories=("cyber_malware",),
    ),
    ClusterPlan(
        id="weapons_drugs",
        title="Weapons, explosives, poisons and illegal drugs",
        severity="critical",
        categories=("weapons_cbrn", "illegal_drugs"),
    ),
    ClusterPlan(
        id="violence_threats",
        title="Violence and threats",
        severity="critical",
        categories=("violence_threats",),
    ),
    ClusterPlan(
        id="self_harm",
        title="Suicide and self-harm",
        severity="critical",
        categories=("self_harm",),
    ),
    ClusterPlan(
        id="hate_harassment",
        title="Hate and harassment",
        severity="warning",
        categories=("hate_harassment",),
    ),
    ClusterPlan(
        id="sexual_content",
        title="Sexual content",
        severity="warning",
        categories=("sexual_content",),
    ),
    ClusterPlan(
        id="fraud_deception",
        title="Fraud, theft and disinformation",
        severity="warning",
        categories=("fraud_deception",),
    ),
    ClusterPlan(
        id="privacy",
        title="Spying and personal data",
        severity="warning",
        categories=("privacy",),
    ),
    ClusterPlan(
        id="jailbreak_injection",
        title="Jailbreaks and prompt injection",
        severity="critical",
        categories=("jailbreak_injection",),
    ),
)
