"""Behind student/serve.py: the messages, the compute thread, one connection, what is measured, and the page."""
