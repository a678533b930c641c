"""The names that other projects give to the keys of a config, for the error about an unknown key."""

OTHER_NAMES = {
    "model.n_layers": "n_layer num_layers num_hidden_layers n_blocks depth layers",
    "model.d_model": "n_embd n_embed hidden_size hidden_dim embed_dim embedding_dim dim width model_dim",
    "model.n_heads": "n_head num_heads num_attention_heads heads",
    "model.n_kv_heads": "n_kv_head num_kv_heads num_key_value_heads num_query_groups kv_heads",
    "model.d_ff": "intermediate_size ffn_dim ffn_hidden_size d_inner n_inner mlp_dim hidden_features",
    "model.max_seq_len": "max_position_embeddings max_sequence_length n_positions",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon",
    "model.rope_theta": "rope_base rotary_base rotary_emb_base",
    "model.tie_embeddings": "tie_word_embeddings tie_weights weight_tying share_embeddings",
    "data.path": "dataset data_path data_dir dataset_path dataset_dir train_data train_data_path",
    "data.seq_len": "block_size context_length context_len context_size ctx_len n_ctx seq_length sequence_length "
    "max_length max_seq_length context",
    "data.loader_threads": "num_workers dataloader_num_workers workers n_workers",
    "optimizer.kind": "optim optimizer_type optimizer_name",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr adam_lr learningrate",
    "optimizer.beta1": "adam_beta1 betas",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_eps adam_epsilon epsilon",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.grad_clip": "max_grad_norm clip_grad gradient_clipping gradient_clip_val clip_grad_norm max_norm",
    "schedule.kind": "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style decay_lr",
    "schedule.warmup_tokens": "warmup warmup_steps warmup_iters num_warmup_steps warmup_ratio lr_warmup_iters",
    "schedule.decay_tokens": "decay_steps lr_decay_iters lr_decay_steps",
    "schedule.min_lr_ratio": "min_lr final_lr min_learning_rate end_lr",
    "train.total_tokens": "steps max_steps num_steps train_steps total_steps iters max_iters train_iters "
    "num_iterations iterations num_train_steps max_train_steps epochs num_epochs max_epochs num_train_epochs "
    "max_tokens train_tokens",
    "train.global_batch_tokens": "batch_size train_batch_size global_batch_size batch total_batch_size batch_tokens "
    "gradient_accumulation_steps grad_accum_steps gradient_accumulation",
    "train.micro_batch": "micro_batch_size device_batch_size per_device_train_batch_size per_device_batch_size "
    "train_micro_batch_size_per_gpu",
    "train.precision": "dtype bf16 fp16 fp32 mixed_precision amp torch_dtype",
    "train.activation_checkpointing": "gradient_checkpointing checkpoint_activations recompute",
    "train.on_nonfinite": "skip_nan nan_policy",
    "train.log_every_steps": "log_interval logging_steps log_every log_freq log_every_n_steps",
    "train.eval_every_steps": "eval_interval eval_steps val_interval eval_every eval_freq val_check_interval",
    "train.eval_tokens": "eval_iters val_tokens eval_batches",
    "train.stop_patience": "patience early_stopping early_stopping_patience",
    "train.monitor": "wandb wandb_log report_to logger tensorboard use_wandb",
    "train.init_from": "pretrained init_checkpoint from_pretrained model_name_or_path",
    "train.seed": "random_seed rng_seed",
    "checkpoint.dir": "output_dir out_dir save_dir save_path checkpoint_dir ckpt_dir run_dir",
    "checkpoint.every_steps": "save_steps save_interval save_every checkpoint_interval ckpt_every",
    "checkpoint.keep_last": "save_total_limit keep_checkpoints max_checkpoints",
    "deepspeed.zero_stage": "zero stage zero_optimization",
    "deepspeed.offload": "cpu_offload offload_optimizer",
}
"""{section.key: names, separated by blanks}"""
