"""Studies of lesson 4: chatbot, summaries, programs."""
