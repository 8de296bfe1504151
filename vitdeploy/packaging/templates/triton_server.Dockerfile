# NVIDIA's server, and the one library that the Python steps of the ensemble need besides numpy.
FROM ${image}
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -m pip install --no-cache-dir "numpy" "pillow==${pillow}"
