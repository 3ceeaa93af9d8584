# What a test without a registry runs instead of two images of others: the same programs, of Debian's packages.
ARG PACKAGES=offbeat-test/packages:bookworm

FROM ${PACKAGES} AS redis
RUN ln -s redis-server /usr/bin/valkey-server && ln -s redis-cli /usr/bin/valkey-cli && install -d -o 999 -g 999 /data

FROM ${PACKAGES} AS prometheus
RUN install -d -o nobody -g nogroup /prometheus
USER nobody
ENTRYPOINT ["prometheus"]
