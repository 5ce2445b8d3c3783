"""A LoRA's names, its tensors and their arithmetic; the door is lora_loader."""
