"""Proofs that an artifact says what its source says: token ids, chats, logits. One worker function per file."""
