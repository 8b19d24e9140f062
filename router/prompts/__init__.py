"""Text and chats to tokens."""
