"""Where safeopt meets other libraries; each module needs its own extra."""
